"""Prefect events of a batch, for automations. They are sent in the background; a lost event does not affect the batch.

flux.batch.finished     once an attempt, whatever its end; its resource is s3://bucket/prefix/manifests/<run>
flux.image.published    for each image that this run wrote; its resource is the image, s3://bucket/key
flux.image.failed       for each row without its images; its resource is s3://bucket/prefix/manifests/<run>/rows/<row>

The destination is also an asset: `prefect.asset.materialization.succeeded` is emitted for s3://bucket/prefix when every
row of a batch has ended. A dry run emits no events. A process that is killed (SIGKILL) can't emit any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from prefect.assets import Asset
from prefect.events import emit_event
from pydantic import ValidationError

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.manifest.records import UNSUCCESSFUL, ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.pipeline import Density

__all__ = [
    "BATCH_FINISHED",
    "IMAGE_FAILED",
    "IMAGE_PUBLISHED",
    "End",
    "Outcome",
    "emit_batch_events",
    "emit_item_events",
    "find_asset",
]

Outcome: TypeAlias = Literal["completed", "failed", "cancelled", "crashed"]
"""How an attempt at a batch ended. It is crashed where its process was stopped, but not by Prefect's cancellation."""

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


@dataclass(frozen=True)
class End:
    """The end of an attempt at a batch.

    Attributes:
        outcome: how it ended.
        reason: the class of the error, or None.
        message: the message of the final state or of the error.
        attempt: the number of the attempt at the flow run, from 1.
        final: whether Prefect does not try the flow run again by itself.
    """

    outcome: Outcome
    reason: str | None
    message: str
    attempt: int
    final: bool


def emit_batch_events(report: BatchReport, bucket: ImageBucket | str, run: str, end: End) -> None:
    """Emit the events of a batch that has ended: its end, and the materialization of its destination.

    These are at most two events, whatever the batch's size. The first has labels for automations to match:
    `flux.outcome`, `flux.final` (`yes` or `no`) and, where there is a manifest, `flux.manifest`. Its payload has the
    report's sums, and as `bucket` a value for a flow's own `bucket`.

    Args:
        report: the report of the run, or the sums so far.
        bucket: the bucket of the images, or what the flow was given where it can't be resolved.
        run: the flow run's id.
        end: how it ended.
    """
    sums = {name: getattr(report, name) for name in sorted(_SUMS)}
    place, reference = (bucket, bucket) if isinstance(bucket, str) else (bucket.uri, bucket.reference)
    message = _clean(end.message)
    emit_event(
        BATCH_FINISHED,
        resource={
            "prefect.resource.id": f"{place}/manifests/{run}",
            "prefect.resource.name": place,
            "flux.outcome": end.outcome,
            "flux.final": "yes" if end.final else "no",
            **({} if report.manifest is None else {"flux.manifest": report.manifest}),
        },
        payload={
            **sums,
            "billed_and_lost": len(report.billed_and_lost),
            "possibly_billed": len(report.possibly_billed),
            "status": end.outcome,
            "reason": end.reason,
            "message": message,
            "attempt": end.attempt,
            "summary": report.summary() if report.rows else message,
            "bucket": reference,
            "run": run,
        },
    )
    if report.plan is not None and not isinstance(bucket, str) and (asset := find_asset(bucket.uri)) is not None:
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
                "message": _clean(record.message or ""),
                "credits_used": record.credits_used,
            },
        )


def find_asset(uri: str) -> Asset | None:
    """Make the asset of an address; None where Prefect does not accept the address, for example with spaces in it."""
    try:
        return Asset(key=uri)
    except ValidationError:
        return None


def _clean(message: str) -> str:
    """Shorten a message and replace lone surrogates, which a message of the service can contain and an event can't."""
    return message[:_MAX_MESSAGE].encode(errors="replace").decode()


def _describe(image: PublishedImage) -> dict[str, Any]:
    return image.model_dump(
        mode="json", include={"uri", "url", "key", "sha256", "size", "width", "height", "content_type", "seed"}
    )
