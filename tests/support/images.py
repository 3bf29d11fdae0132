"""Images for tests of what a batch shows of them."""

from __future__ import annotations

import hashlib
import io
from datetime import datetime, timezone
from pathlib import Path
from uuid import uuid4

from PIL import Image

from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage, PublishingRun
from flux_prefect.host.spool import ImageFile

ENDPOINT = "http://127.0.0.1:9"

ODD = (
    "<script>alert('x')</script> **bold** _u_ `code` | pipe [link](https://a.example) ![](b) \"quoted\" & &amp; 🦊"
    "\n\n# heading\n\n- item\n</td></tr></table>\u202eمرحبا"
)
"""A prompt with everything in it that means something in HTML, markdown or a table, and text from right to left."""


def draw(gray: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A JPEG of one shade."""
    stream = io.BytesIO()
    Image.new("L", size, gray).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def answer(request: ImageRequest) -> Generation:
    """The paid answer to a request."""
    return Generation(
        request=request,
        endpoint=ENDPOINT,
        fingerprint=request.fingerprint(ENDPOINT),
        images=(GeneratedImage(index=0, url=f"{ENDPOINT}/x.jpg"),),
        seed=request.seed,
        client_request_id="fp-1",
        created_at=datetime.now(timezone.utc),
    )


def make_file(folder: Path, request: ImageRequest, color: tuple[int, int, int] = (40, 90, 160)) -> ImageFile:
    """An image in custody, as the download step leaves it."""
    stream = io.BytesIO()
    Image.new("RGB", (48, 32), color).save(stream, request.output_format or "png")
    content = stream.getvalue()
    path = folder / f"{uuid4().hex}.{request.extension}"
    path.write_bytes(content)
    generation = Generation(
        request=request,
        endpoint=ENDPOINT,
        fingerprint=request.fingerprint(ENDPOINT),
        images=(GeneratedImage(index=0, url=f"{ENDPOINT}/files/1.jpg"),),
        seed=request.seed,
        reported_seed=request.seed,
        credits_used=168_000,
        client_request_id="fp-1",
        created_at=datetime.now(timezone.utc),
    )
    return ImageFile(
        path=path,
        index=0,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        format=request.output_format,
        content_type=f"image/{request.output_format}",
        width=48,
        height=32,
        black=False,
        generation=generation,
    )


async def publish(bucket: ImageBucket, folder: Path, request: ImageRequest, content: bytes) -> PublishedImage:
    """An image in the bucket."""
    path = folder / f"{uuid4().hex}.jpg"
    path.write_bytes(content)
    file = ImageFile(
        path=path,
        index=0,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        format="jpeg",
        content_type="image/jpeg",
        width=16,
        height=16,
        black=False,
        generation=answer(request),
    )
    return await bucket.publish(file, PublishingRun())


def fake_published_image(
    bucket: ImageBucket, request: ImageRequest, *, hour: int = 0, created: bool = True
) -> PublishedImage:
    """A published image whose object does not exist."""
    fingerprint = request.fingerprint(ENDPOINT)
    key = bucket.key_of(request, fingerprint, 0)
    return PublishedImage(
        bucket=bucket.bucket_name,
        key=key,
        uri=f"s3://{bucket.bucket_name}/{key}",
        url=None,
        etag="e",
        sha256="0" * 64,
        size=1,
        content_type="image/jpeg",
        width=16,
        height=16,
        fingerprint=fingerprint,
        index=0,
        seed=request.seed,
        sidecar_key=f"{key}.json",
        published_at=datetime(2026, 1, 1, hour, tzinfo=timezone.utc),
        created=created,
    )
