"""A batch's artifacts in Prefect's UI: live progress, then a summary and a gallery.

Their keys are the same in every run, so that Prefect's history shows one run after another:

flux-progress   rows done of total, pace, credits, time left
flux-summary    counts, costs, problems that need attention, addresses of the results
flux-gallery    the newest images, and the errors of rows without images
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import TypeVar
from uuid import UUID

import anyio
from prefect.artifacts import acreate_markdown_artifact, acreate_progress_artifact, aupdate_progress_artifact

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.gallery import publish_page
from flux_prefect.display.markdown import write_markdown_gallery, write_summary
from flux_prefect.display.progress import Logger, Progress
from flux_prefect.display.recent_records import PAGE
from flux_prefect.display.thumbnails import make_thumbnails
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport

__all__ = ["live_progress", "publish_artifacts"]

UPDATE_SECONDS = 10.0
"""Seconds between two updates of a progress artifact. Each takes the server about 40 milliseconds."""

_LAST_UPDATE_SECONDS = 5.0
_MAX_SECONDS = 60.0

_Value = TypeVar("_Value")


@asynccontextmanager
async def live_progress(progress: Progress, logger: Logger, *, every: float = UPDATE_SECONDS) -> AsyncIterator[None]:
    """Update a progress artifact of the enclosing flow run while the block runs.

    Updates run in the background: a slow or failing server neither delays nor fails the block, and a failed update is
    retried with the next one. When the block ends without an exception, a last update waits for the server for at most
    five seconds; if it fails, a warning is logged.
    """
    ended = asyncio.Event()
    updates = asyncio.create_task(_update(progress, ended, every))
    try:
        yield
        ended.set()
        await asyncio.wait([updates], timeout=_LAST_UPDATE_SECONDS)
    finally:
        updates.cancel()
        (failure,) = await asyncio.gather(updates, return_exceptions=True)
    if failure is not None:
        reason = "the server took too long" if isinstance(failure, asyncio.CancelledError) else failure
        logger.warning("The progress artifact is out of date: %s", reason)


async def _update(progress: Progress, ended: asyncio.Event, every: float) -> None:
    artifact: UUID | None = None
    last = False
    while True:
        failure: Exception | None = None
        try:
            if artifact is None:
                artifact = await acreate_progress_artifact(progress.percent, "flux-progress", progress.summary())
            else:
                await aupdate_progress_artifact(artifact, progress.percent, progress.summary())
        except Exception as error:  # noqa: BLE001 - no error of an update may fail the batch
            failure = error
        if last:
            if failure is not None:
                raise failure
            return
        with anyio.move_on_after(every):
            await ended.wait()
        last = ended.is_set()


async def publish_artifacts(
    report: BatchReport, newest: Sequence[ItemRecord], bucket: ImageBucket, spool: Spool, logger: Logger
) -> None:
    """Publish the page of a batch that has ended, and the summary and gallery artifacts of the enclosing flow run.

    Never fails the run: a part that fails is left out, with a warning in the log. Each part takes at most a minute; a
    thousand rows take a second or two.

    Args:
        report: the batch's report, with its manifest's address.
        newest: the newest records of the batch, newest first.
        bucket: the bucket that the batch was published to.
        spool: the spool, whose images need not be read from the bucket.
        logger: the run's logger.
    """
    page, thumbnails = await asyncio.gather(
        _attempt("page of all images", publish_page(report, bucket), logger),
        _attempt("images in the gallery", draw_thumbnails(newest, bucket, spool), logger),
    )
    await asyncio.gather(
        _attempt("summary", show_summary(report, bucket, page), logger),
        _attempt("gallery", show_gallery(newest, thumbnails or {}, report, bucket, page), logger),
    )


async def _attempt(what: str, work: Awaitable[_Value], logger: Logger) -> _Value | None:
    try:
        with anyio.fail_after(_MAX_SECONDS):
            return await work
    except Exception as error:  # noqa: BLE001 - the images are published; pages about them must not fail the run
        logger.warning("The %s is missing from this run's artifacts: %s", what, str(error) or repr(error))
        return None


async def show_summary(report: BatchReport, bucket: ImageBucket, page: str | None) -> None:
    """Create the artifact `flux-summary` of the enclosing flow run.

    Args:
        report: the batch's report.
        bucket: the bucket that the batch was published to.
        page: the key of its page, or None.

    Raises:
        Exception: Prefect's server rejected the artifact.
    """
    text = await anyio.to_thread.run_sync(write_summary, report, bucket, page)
    await acreate_markdown_artifact(text, "flux-summary", description=report.summary())


async def draw_thumbnails(records: Sequence[ItemRecord], bucket: ImageBucket, spool: Spool) -> dict[str, str]:
    """Draw the thumbnails for a gallery of these records: `data:` URIs by the images' s3:// addresses.

    Args:
        records: the records, newest first.
        bucket: the bucket that the images were published to.
        spool: the spool, whose images need not be read from the bucket.
    """
    images = list(islice((image for record in records for image in record.images), PAGE))
    thumbnails = await make_thumbnails(images, bucket, spool)
    return {image.uri: thumbnail for image, thumbnail in zip(images, thumbnails, strict=True) if thumbnail}


async def show_gallery(
    records: Sequence[ItemRecord],
    thumbnails: dict[str, str],
    report: BatchReport,
    bucket: ImageBucket,
    page: str | None,
) -> None:
    """Create the artifact `flux-gallery` of the enclosing flow run: at most 48 images or errors, under 1 MiB.

    Args:
        records: the records, newest first.
        thumbnails: `data:` URIs by the images' s3:// addresses.
        report: the batch's report.
        bucket: the bucket that the batch was published to.
        page: the key of the page with all rows, or None.

    Raises:
        Exception: Prefect's server rejected the artifact.
    """
    text = write_markdown_gallery(records, thumbnails, report, bucket, page)
    await acreate_markdown_artifact(text, "flux-gallery", description=report.summary())
