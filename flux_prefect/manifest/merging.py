"""Merging the records of several attempts at a shard into one record for each row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import FluxError, RunStopped
from flux_prefect.manifest.records import ItemRecord

__all__ = ["attribute_images", "fold", "is_pending", "mark_failed", "merge_attempts"]


def is_pending(record: ItemRecord) -> bool:
    """Check whether a row remains to be done: a cap left it out, or the run was stopped before it."""
    stopped = record.status == "failed" and record.error == RunStopped.__name__
    return stopped or record.status == "skipped_budget"


def fold(records: Sequence[ItemRecord]) -> ItemRecord:
    """Merge the records that all attempts wrote for a row.

    A row that one attempt published counts as published, even if a later attempt found it unchanged; otherwise the last
    attempt's status counts. Calls and costs are added up.

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
    """Make the failed record of a row that will not be tried again, with its costs so far."""
    return record.model_copy(
        update={"status": "failed", "images": (), "error": type(error).__name__, "message": error.message}
    )


def merge_attempts(table: Iterable[ItemRecord], attempts: Sequence[Iterable[ItemRecord]]) -> dict[int, ItemRecord]:
    """Merge the records of a shard: one for each row, in the table's order.

    A row that no attempt recorded keeps its record from the table. All records are in memory.

    Args:
        table: the shard's rows, as records of rows that remain to be done.
        attempts: the records of each attempt, in the order of the attempts.
    """
    recorded: dict[int, list[ItemRecord]] = {}
    for attempt in attempts:
        for record in attempt:
            recorded.setdefault(record.row, []).append(record)
    return {pending.row: fold(recorded.get(pending.row, [pending])) for pending in table}


async def attribute_images(
    records: Iterable[ItemRecord], bucket: ImageBucket, runs: Collection[str]
) -> dict[int, ItemRecord]:
    """Count images for this batch that one of its runs published before it was killed, and did not record.

    A later attempt found them in the bucket. The sidecar of each image has the run that published it, and its cost.
    Costs one GET for each row that was found unchanged, and none where all runs ended normally.

    Args:
        records: the merged records of a shard.
        bucket: where the images are.
        runs: the flow runs of this batch.

    Raises:
        BucketError: a sidecar can't be read.
    """
    merged = {record.row: record for record in records}
    counted = {
        image.fingerprint for record in merged.values() if record.status == "published" for image in record.images
    }
    for row, record in merged.items():
        if record.status != "unchanged" or record.images[0].fingerprint in counted:
            continue
        sidecar = await bucket.read_record(record.images[0]) or {}
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


def _unite(ids: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for some in ids for one in some))
