"""Small images for the pages of Prefect's UI, as `data:` URIs, so that they show of private buckets too."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence

import anyio
import anyio.to_thread
from PIL import Image

from flux_prefect.api.client import MAX_PIXELS
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.errors import BucketError, ImageTooLarge, SpoolUnreadable
from flux_prefect.host.spool import Spool

__all__ = ["MOST_BYTES", "draw_thumbnail", "make_thumbnails"]

SIDE = 160
"""Pixels of a thumbnail's longer side."""

MOST_BYTES = 9_000
"""The largest thumbnail before base64: 48 of them are 576,000 characters. Most are a third of that."""

_QUALITIES = (80, 60, 40, 20, 5)  # at the last one noise, which compresses worst, takes less than half of MOST_BYTES
_DRAWN_AT_ONCE = 4


async def make_thumbnails(images: Sequence[PublishedImage], bucket: ImageBucket, spool: Spool) -> list[str | None]:
    """A JPEG of each image as a `data:` URI, in order; None where the image can't be read or drawn.

    Drawn from the spool's file where it has the published bytes, else from the bucket: a GET each. Some ten
    milliseconds an image in threads, four at once; memory for four images.
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
            except Exception:  # noqa: BLE001 - odd bytes make Pillow raise nearly anything; the page goes on without
                return
        drawn[place] = f"data:image/jpeg;base64,{base64.b64encode(thumbnail).decode()}"

    async with anyio.create_task_group() as drawing:
        for place, image in enumerate(images):
            drawing.start_soon(draw, place, image)
    return drawn


def draw_thumbnail(content: bytes) -> bytes:
    """An image's bytes as a JPEG of at most 160 pixels a side and at most 9,000 bytes. Call it in a thread.

    What is transparent becomes white.

    Raises:
        ImageTooLarge: more pixels than this package decodes.
        Exception: whatever Pillow raises of bytes that are no whole JPEG or PNG.
    """
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ImageTooLarge(f"{image.width} x {image.height} pixels are over the limit of {MAX_PIXELS:,}.")
        image.thumbnail((SIDE, SIDE))  # decodes a JPEG at a fraction of its size
        small = Image.new("RGB", image.size, "white")
        small.paste(image, mask=image.convert("RGBA") if image.has_transparency_data else None)
    encoded = b""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=quality, optimize=True)
        encoded = stream.getvalue()
        if len(encoded) <= MOST_BYTES:
            break
    return encoded


def _read_spooled(spool: Spool, image: PublishedImage) -> bytes | None:
    """The published bytes, where this host still has them."""
    try:
        generation = spool.find_generation(image.fingerprint)
        if generation is None:
            return None
        content = spool.image_path(generation, image.index).read_bytes()
    except (OSError, SpoolUnreadable):
        return None
    return content if hashlib.sha256(content).hexdigest() == image.sha256 else None
