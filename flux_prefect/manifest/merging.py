"""One record a row out of what several attempts at a shard have told of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.errors import FluxError, RunStopped
from flux_prefect.manifest.records import ItemRecord

__all__ = ["attribute_images", "fold", "is_pending", "mark_failed", "merge_attempts"]


def is_pending(record: ItemRecord) -> bool:
    """Whether a row is still to be done: a cap left it out, or the run was told to end before it."""
    stopped = record.status == "failed" and record.error == RunStopped.__name__
    return stopped or record.status == "skipped_budget"


def fold(records: Sequence[ItemRecord]) -> ItemRecord:
    """What all attempts together made of a row.

    Published once is published, although a later attempt found it there; else the last attempt has the word. Calls and
    costs are added up.

    Args:
        records: of one row, in the order of the attempts; at least one.
    """
    chosen = next((record for record in records if record.status == "published"), records[-1])
    return chosen.model_copy(
        update={
            **{
                name: sum(getattr(record, name) for record in records)
                for name in ("calls", "billed_calls", "unbilled_calls", "unpriced_calls", "credits_used", "refetched")
            },
            "regenerated": any(record.regenerated for record in records),
            "billed_and_lost": _unite(record.billed_and_lost for record in records),
            "possibly_billed": _unite(record.possibly_billed for record in records),
        }
    )


def mark_failed(record: ItemRecord, error: FluxError) -> ItemRecord:
    """The record of a row that nobody will do, with what was spent on it so far."""
    return record.model_copy(
        update={"status": "failed", "images": (), "error": type(error).__name__, "message": error.message}
    )


def merge_attempts(table: Iterable[ItemRecord], attempts: Sequence[Iterable[ItemRecord]]) -> dict[int, ItemRecord]:
    """The folded record of every row of a shard, in the table's order; of a row that no attempt told of, the table's.

    Memory: all of them.

    Args:
        table: the shard's rows, as records of rows yet to be done.
        attempts: the records of each, in their order.
    """
    told: dict[int, list[ItemRecord]] = {}
    for attempt in attempts:
        for record in attempt:
            told.setdefault(record.row, []).append(record)
    return {waiting.row: fold(told.get(waiting.row, [waiting])) for waiting in table}


async def attribute_images(
    records: Iterable[ItemRecord], bucket: ImageBucket, runs: Collection[str]
) -> dict[int, ItemRecord]:
    """Count images for this batch that a run of it has published, and was killed before it could tell.

    A later attempt found them there. The record beside an image names the run that published it, and what it cost.
    One GET for every row that was found so, and none where all runs ended in order.

    Args:
        records: the folded ones of a shard.
        bucket: where the images are.
        runs: the flow runs of this batch.

    Raises:
        BucketError: a record can't be read.
    """
    merged = {record.row: record for record in records}
    counted = {
        image.fingerprint for record in merged.values() if record.status == "published" for image in record.images
    }
    for row, record in merged.items():
        if record.status != "unchanged" or record.images[0].fingerprint in counted:
            continue
        sidecar = await _read_sidecar(bucket, record.images[0])
        if sidecar.get("run", {}).get("flow_run_id") not in runs:
            continue
        counted.add(record.images[0].fingerprint)
        cost = sidecar.get("credits_used")
        merged[row] = record.model_copy(
            update={
                "status": "published",
                "images": tuple(image.model_copy(update={"created": True}) for image in record.images),
                "calls": record.calls + 1,
                "billed_calls": record.billed_calls + 1,
                "unpriced_calls": record.unpriced_calls + (cost is None),
                "credits_used": record.credits_used + (cost or 0.0),
            }
        )
    return merged


async def _read_sidecar(bucket: ImageBucket, image: PublishedImage) -> Mapping[str, Any]:
    path = image.sidecar_key.removeprefix(f"{bucket.prefix}/")
    try:
        record = json.loads(await bucket.read_path(path))
    except ValueError:  # gone, or not written by this package
        return {}
    return record if isinstance(record, dict) else {}


def _unite(ids: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for some in ids for one in some))
