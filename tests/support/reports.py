"""Records and reports of batches that never ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport, Tally
from flux_prefect.manifest.writer import record_line
from support.images import fake_published_image

SHOP = ImageBucket(bucket_name="images", prefix="shop", public_base_url="https://cdn.example")
"""The bucket of `published_record`."""


def published_record(row: int, prompt: str = "a fox", **fields: Any) -> ItemRecord:
    """The record of a row whose image was published."""
    request = ImageRequest(prompt=prompt, seed=row)
    image = fake_published_image(SHOP, request)
    return ItemRecord(
        **{"row": row, "id": f"sku-{row}", "status": "published", "request": request, "images": (image,), **fields}
    )


def failed_record(row: int, message: str = "The service refused it.", **fields: Any) -> ItemRecord:
    """The record of a row that failed."""
    return ItemRecord(
        **{
            "row": row,
            "id": f"sku-{row}",
            "status": "failed",
            "request": ImageRequest(prompt="a fox", seed=row),
            "error": "RequestRefused",
            "message": message,
            **fields,
        }
    )


def make_report(items: Sequence[ItemRecord], folder: Path, *, seconds: float = 1.0) -> BatchReport:
    """The report of a batch that ended with these records, which are written to the folder."""
    tally = Tally()
    for item in items:
        tally.add(item)
    records = folder / "records.jsonl"
    records.write_bytes(b"".join(record_line(item, "run-1") for item in items))
    return tally.report(seconds=seconds).model_copy(update={"records": records})
