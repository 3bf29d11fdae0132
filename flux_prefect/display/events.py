"""Prefect events of a batch, for automations. They are sent in the background; a lost event does not affect the batch.

flux.batch.finished     once, when the manifest is complete; its resource is s3://bucket/prefix/manifests/<run>
flux.image.published    for each image that this run wrote; its resource is the image, s3://bucket/key
flux.image.failed       for each row without its images; its resource is s3://bucket/prefix/manifests/<run>/rows/<row>

The destination is also an asset: `prefect.asset.materialization.succeeded` is emitted for s3://bucket/prefix. A dry run
emits no events. A cancelled run has emitted those of its images; Prefect itself emits the event of its end.
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

# The event that Prefect emits for a task marked with @materialize. A batch is a flow; an additional task run, made only
# to be marked, would appear in every count of the flow's task runs.
_MATERIALIZED = "prefect.asset.materialization.succeeded"

_MAX_MESSAGE = 1000
_SUMS = {
    *("counts", "calls", "billed_calls", "unbilled_calls", "unpriced_calls", "unknown_calls"),
    *("credits_used", "seconds", "rows", "unsuccessful", "manifest"),
}


def emit_batch_events(report: BatchReport, bucket: ImageBucket, run: str, *, succeeded: bool) -> None:
    """Emit the events of a batch that has ended: its end, and the materialization of its destination.

    These are two events, whatever the batch's size. The first has the label `flux.outcome`, `completed` or `failed`,
    for automations to match. Its payload has the report's sums, and as `bucket` a value for a flow's own `bucket`.

    Args:
        report: the report of a run whose manifest is in the bucket.
        bucket: the bucket of the images.
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
    """Emit the events of a row that has ended: one for each image that this run wrote, and one if images are missing.

    Only for the density `steps`: the server stores each event, in addition to about ten from the row's task runs. With
    `chunks`, where one task run covers a hundred rows, this does nothing, and only the manifest has the rows.
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
        message = (record.message or "")[:_MAX_MESSAGE]
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
                # A message of the service can contain a lone surrogate, which an event can't.
                "message": message.encode(errors="replace").decode(),
                "credits_used": record.credits_used,
            },
        )


def find_asset(uri: str) -> Asset | None:
    """Make the asset of an address; None where Prefect does not accept the address, for example with spaces in it."""
    try:
        return Asset(key=uri)
    except ValidationError:
        return None


def _describe(image: PublishedImage) -> dict[str, Any]:
    return image.model_dump(
        mode="json", include={"uri", "url", "key", "sha256", "size", "width", "height", "content_type", "seed"}
    )
