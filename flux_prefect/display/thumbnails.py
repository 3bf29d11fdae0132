"""Thumbnails for Prefect's UI, as `data:` URIs, so that images of private buckets are shown too."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence

import anyio
import anyio.to_thread

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.display.small_images import draw_small
from flux_prefect.errors import BucketError, SpoolUnreadable
from flux_prefect.host.spool import Spool

__all__ = ["MOST_BYTES", "draw_thumbnail", "make_thumbnails"]

SIDE = 160
"""The length of a thumbnail's longer side, in pixels."""

MOST_BYTES = 9_000
"""The maximum size of a thumbnail before base64, in bytes: 48 are 576,000 characters. Most are a third of it."""

_QUALITIES = (80, 60, 40, 20, 5)  # at the last one noise, which compresses worst, takes less than half of MOST_BYTES
_DRAWN_AT_ONCE = 4


async def make_thumbnails(images: Sequence[PublishedImage], bucket: ImageBucket, spool: Spool) -> list[str | None]:
    """Draw a JPEG of each image as a `data:` URI, in order; None where an image can't be read or drawn.

    Images are read from the spool where it has the published bytes, else from the bucket, with one GET each. Takes
    about ten milliseconds an image, in four threads at once, and the memory of four images.
    """
    drawn: list[str | None] = [None] * len(images)
    limit = anyio.CapacityLimiter(_DRAWN_AT_ONCE)

    async def draw(place: int, image: PublishedImage) -> None:
        async with limit:
            try:
                content = await anyio.to_thread.run_sync(_read_spooled, spool, image)
                if content is None:
                    content = await bucket.read_image(image)
                thumbnail = await anyio.to_thread.run_sync(draw_thumbnail, content)
            except BucketError:
                return
            except Exception:  # noqa: BLE001 - Pillow can raise nearly any exception on broken bytes; the page leaves the image out
                return
        drawn[place] = f"data:image/jpeg;base64,{base64.b64encode(thumbnail).decode()}"

    async with anyio.create_task_group() as drawing:
        for place, image in enumerate(images):
            drawing.start_soon(draw, place, image)
    return drawn


def draw_thumbnail(content: bytes) -> bytes:
    """Draw an image as a JPEG of at most 160 pixels a side and at most 9,000 bytes. Call it in a thread.

    See `draw_small` for what it looks like, and for the errors.
    """
    small = draw_small(content, SIDE)
    encoded = b""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=quality, optimize=True)
        encoded = stream.getvalue()
        if len(encoded) <= MOST_BYTES:
            break
    return encoded


def _read_spooled(spool: Spool, image: PublishedImage) -> bytes | None:
    """The published bytes from this host's spool; None where it does not have them."""
    try:
        generation = spool.find_generation(image.fingerprint)
        if generation is None:
            return None
        content = spool.image_path(generation, image.index).read_bytes()
    except (OSError, SpoolUnreadable):
        return None
    return content if hashlib.sha256(content).hexdigest() == image.sha256 else None
