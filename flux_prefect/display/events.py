"""What a batch tells automations, as Prefect events. Sent in the background: one that is lost costs the batch nothing.

flux.batch.finished     once, when the manifest is whole; its resource is s3://bucket/prefix/manifests/<run>
flux.image.published    an image that this run wrote; its resource is the image, s3://bucket/key
flux.image.failed       a row without its images; its resource is s3://bucket/prefix/manifests/<run>/rows/<row>

And the destination as an asset: `prefect.asset.materialization.succeeded` of s3://bucket/prefix. A dry run tells of
nothing; one that was cancelled has told of its images, and Prefect itself tells of its end.
"""

from __future__ import annotations

from typing import Any

from prefect.assets import Asset
from prefect.events import emit_event
from pydantic import ValidationError

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.manifest.records import UNSUCCESSFUL, ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.pipeline import Density

__all__ = ["BATCH_FINISHED", "IMAGE_FAILED", "IMAGE_PUBLISHED", "emit_batch_events", "emit_item_events", "find_asset"]

BATCH_FINISHED = "flux.batch.finished"
IMAGE_PUBLISHED = "flux.image.published"
IMAGE_FAILED = "flux.image.failed"

# What Prefect itself sends where a task is marked with @materialize. A batch is a flow, and a task run made only to be
# marked would show up in every count of its steps.
_MATERIALIZED = "prefect.asset.materialization.succeeded"

_MOST_OF_A_MESSAGE = 1000
_SUMS = {
    *("counts", "calls", "billed_calls", "unbilled_calls", "unpriced_calls", "unknown_calls"),
    *("credits_used", "seconds", "rows", "unsuccessful", "manifest"),
}


def emit_batch_events(report: BatchReport, bucket: ImageBucket, run: str, *, succeeded: bool) -> None:
    """Tell that a batch has ended, and what stands at its destination now. Two events, whatever the batch's size.

    The label `flux.outcome` of the first is `completed` or `failed`, so that an automation can match it. Its payload
    has the report's sums, and as `bucket` what a flow's parameter of that name takes.

    Args:
        report: of a run whose manifest is in the bucket.
        bucket: where the images are.
        run: the flow run's id.
        succeeded: whether the run ends as Completed.
    """
    sums = {name: getattr(report, name) for name in sorted(_SUMS)}
    emit_event(
        BATCH_FINISHED,
        resource={
            "prefect.resource.id": f"{bucket.uri}/manifests/{run}",
            "prefect.resource.name": bucket.uri,
            "flux.outcome": "completed" if succeeded else "failed",
        },
        payload={
            **sums,
            "billed_and_lost": len(report.billed_and_lost),
            "possibly_billed": len(report.possibly_billed),
            "summary": report.summary(),
            "bucket": bucket.reference,
            "run": run,
        },
    )
    if (asset := find_asset(bucket.uri)) is not None:
        emit_event(_MATERIALIZED, resource={"prefect.resource.id": asset.key}, payload={**sums, "run": run})


def emit_item_events(record: ItemRecord, bucket: ImageBucket, run: str, *, density: Density) -> None:
    """Tell of a row that has ended: an event an image that this run wrote, and one where images are missing.

    In `steps` alone: the server stores each, beside the ten or so that the row's own task runs send. In `chunks` one
    task run stands for a hundred rows, and the manifest alone tells of them.
    """
    if density != "steps":
        return
    for image in record.images:
        if image.created:
            emit_event(
                IMAGE_PUBLISHED,
                resource={"prefect.resource.id": image.uri, "prefect.resource.name": record.id},
                payload={"row": record.row, "id": record.id, "run": run, **_describe(image)},
            )
    if record.status in UNSUCCESSFUL:
        message = (record.message or "")[:_MOST_OF_A_MESSAGE]
        emit_event(
            IMAGE_FAILED,
            resource={
                "prefect.resource.id": f"{bucket.uri}/manifests/{run}/rows/{record.row}",
                "prefect.resource.name": record.id,
                "flux.status": record.status,
            },
            payload={
                "row": record.row,
                "id": record.id,
                "run": run,
                "status": record.status,
                "error": record.error,
                # A service's message can hold half a character, which no event can.
                "message": message.encode(errors="replace").decode(),
                "credits_used": record.credits_used,
            },
        )


def find_asset(uri: str) -> Asset | None:
    """The asset of an address; None where Prefect takes no such address for one, as with spaces in it."""
    try:
        return Asset(key=uri)
    except ValidationError:
        return None


def _describe(image: PublishedImage) -> dict[str, Any]:
    return image.model_dump(
        mode="json", include={"uri", "url", "key", "sha256", "size", "width", "height", "content_type", "seed"}
    )
