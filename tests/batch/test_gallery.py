"""The page of a batch's pictures."""

from __future__ import annotations

import hashlib
import io
from datetime import datetime, timezone
from pathlib import Path
from uuid import uuid4

from PIL import Image
from reports import make_report

from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest
from flux_prefect.batch.gallery import write_gallery
from flux_prefect.batch.report import ItemRecord
from flux_prefect.bucket import ImageBucket, PublishedImage, PublishingRun
from flux_prefect.spool import ImageFile

ODD = "<script>alert('x')</script> | \"quoted\" & 🦊\nمرحبا"


async def publish(bucket: ImageBucket, folder: Path, request: ImageRequest, gray: int) -> PublishedImage:
    """One small picture in the bucket."""
    stream = io.BytesIO()
    Image.new("L", (16, 16), gray).convert("RGB").save(stream, "JPEG")
    path = folder / f"{uuid4().hex}.jpg"
    path.write_bytes(stream.getvalue())
    generation = Generation(
        request=request,
        endpoint="http://127.0.0.1:9",
        fingerprint=request.fingerprint("http://127.0.0.1:9"),
        images=(GeneratedImage(index=0, url="http://127.0.0.1:9/x.jpg"),),
        seed=request.seed,
        client_request_id="fp-1",
        created_at=datetime.now(timezone.utc),
    )
    file = ImageFile(
        path=path,
        index=0,
        sha256=hashlib.sha256(stream.getvalue()).hexdigest(),
        size=len(stream.getvalue()),
        format="jpeg",
        content_type="image/jpeg",
        width=16,
        height=16,
        black=False,
        generation=generation,
    )
    return await bucket.publish(file, PublishingRun())


async def test_pictures_stand_beside_the_page_and_text_stays_text(bucket: ImageBucket, tmp_path: Path) -> None:
    """Whatever a prompt, an id or a message holds; and whatever the bucket's key template is."""
    nested = bucket.model_copy(update={"key_template": "{fingerprint}/{index}.{extension}"})
    requests = [ImageRequest(prompt=ODD, seed=seed) for seed in (1, 2)]
    images = [await publish(nested, tmp_path, request, 40 * request.seed) for request in requests if request.seed]
    items = [
        ItemRecord(row=number, id=f"<b>{number}", status="published", request=request, images=(image,))
        for number, (request, image) in enumerate(zip(requests, images, strict=True), start=1)
    ]
    items.append(ItemRecord(row=3, id="bad", status="invalid", request=None, error="InvalidRow", message="<i>no</i>"))
    page = await write_gallery(make_report(items, tmp_path), nested, tmp_path / "gallery", title="Published & <done>")

    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;1" in text
    assert "&lt;i&gt;no&lt;/i&gt;" in text
    assert "Published &amp; &lt;done&gt;" in text
    kept = [path.read_bytes() for path in sorted((tmp_path / "gallery" / "pictures").iterdir())]
    assert sorted(hashlib.sha256(content).hexdigest() for content in kept) == sorted(image.sha256 for image in images)


def test_a_call_that_two_rows_share_is_counted_once(tmp_path: Path) -> None:
    """Both rows tell of it; the sums do not."""
    request = ImageRequest(prompt="a fox", seed=1)
    items = [
        ItemRecord(row=row, id=str(row), status="published", request=request, possibly_billed=("fp-1",))
        for row in (1, 2)
    ]
    report = make_report(items, tmp_path)

    assert report.possibly_billed == ("fp-1",)
    assert report.summary().endswith("; 1 possibly billed")
