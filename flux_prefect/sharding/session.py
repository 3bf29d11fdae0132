"""The life of a batch in shards around its supervisor, and of one shard around the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from flux_prefect.batch.context import BatchContext
from flux_prefect.batch.planning import PlannedBatch
from flux_prefect.batch.published_index import PublishedIndex
from flux_prefect.batch.session import BatchResult, execute_batch, resume_pace
from flux_prefect.batch.shutdown import sigterm_as_cancellation
from flux_prefect.display.artifacts import live_progress
from flux_prefect.display.progress import Logger, Progress
from flux_prefect.host.spool import Experience
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport, Tally
from flux_prefect.manifest.writer import ManifestWriter
from flux_prefect.sharding.active_batch import ActiveBatch
from flux_prefect.sharding.heartbeat import heartbeat_object, sending_heartbeats
from flux_prefect.sharding.runs import ShardRuns
from flux_prefect.sharding.shards import Split, plan_shard
from flux_prefect.sharding.supervisor import ShardingOptions, Supervisor
from flux_prefect.tables.table import Table

__all__ = ["execute_shard", "supervise_shards"]


async def supervise_shards(  # noqa: PLR0913 - keyword-only from the fourth on
    context: BatchContext,
    split: Split,
    manifest: ManifestWriter,
    *,
    active_batch: ActiveBatch,
    runs: ShardRuns,
    options: ShardingOptions,
    on_record: Callable[[ItemRecord], None],
    logger: Logger,
) -> BatchReport:
    """Supervise the shards until every row has its record, and return the report.

    Every record is in the manifest before `on_record` receives it. If every row ended by itself, the batch is no longer
    active. The prices and the pace of all workers are stored for the next batch of this host.

    Args:
        context: bucket, account, spool and budget of the batch.
        split: the batch and its shards.
        manifest: the batch's manifest; opened and closed here.
        active_batch: the batch, held by this run.
        runs: the runs of the shards.
        options: how the batch is spread over runs.
        on_record: called with every record, when it is final.
        logger: the run's logger.

    Raises:
        TerminationSignal: the process received a SIGTERM. The shards have been stopped, and the manifest is whole.
        LeaseLost: another run may have taken over the batch.
        PrefectException, httpx.HTTPError, BucketError: see `Supervisor.run`.
    """
    tally = Tally()

    def record_row(record: ItemRecord) -> None:
        manifest.append(record)
        tally.add(record)
        on_record(record)

    supervisor = Supervisor(
        context=context,
        split=split,
        runs=runs,
        options=options,
        on_record=record_row,
        progress=Progress.of(split.plan),
        check_lease=active_batch.lease.check,
        logger=logger,
    )
    started = time.monotonic()
    with sigterm_as_cancellation():
        async with manifest, live_progress(supervisor.progress, logger):
            await supervisor.run()
    if supervisor.complete:
        await active_batch.remove()
    report = tally.report(seconds=time.monotonic() - started, plan=split.plan)
    report = report.model_copy(update={"manifest": manifest.uri, "records": manifest.path})
    if (found := supervisor.reconciliation()) is not None:
        report = report.settle(found)
    context.spool.keep_experience(context.account.base_url, _experience_after(context, report, supervisor.prices))
    return report


async def execute_shard(  # noqa: PLR0913 - keyword-only from the fourth on
    context: BatchContext, table: Table, manifest: ManifestWriter, *, run: str, heartbeat_seconds: float, logger: Logger
) -> BatchReport:
    """Execute the rows of one shard while heartbeats report its progress and spending, and return the report.

    Args:
        context: bucket, account, spool and the shard's share of the budget.
        table: the shard's table.
        manifest: the run's manifest; opened and closed here.
        run: id of the run.
        heartbeat_seconds: seconds between two heartbeats.
        logger: the run's logger.

    Raises:
        ShardSuperseded: another process has started this run, or the batch has replaced it.
        TerminationSignal, BucketError, ManifestUnwritable: see `execute_batch`.
    """
    progress = _ShardProgress()
    pacer = resume_pace(context)

    def read_fields() -> dict[str, Any]:
        return {
            **progress.sums(),
            "credits_spent": context.budget.spent.credits,
            "images_spent": int(context.budget.spent.images),
            "in_flight": pacer.learned_limit,
            "prices": context.budget.observed,
        }

    with closing(PublishedIndex()) as found:
        planned = PlannedBatch(plan_shard(table, context), run, found, table)
        async with sending_heartbeats(
            heartbeat_object(context.bucket, run),
            read_fields,
            interval=heartbeat_seconds,
            on_lost=context.budget.close,
        ):
            progress.result = await execute_batch(
                context, planned, manifest, density="chunks", on_record=progress.add, logger=logger
            )
    return progress.result.report


class _ShardProgress:
    """The progress of a shard's rows, as its heartbeats report it."""

    def __init__(self) -> None:
        self.result: BatchResult | None = None
        self._done = 0
        self._images = 0

    def add(self, record: ItemRecord) -> None:
        self._done += 1
        self._images += sum(image.created for image in record.images)

    def sums(self) -> dict[str, Any]:
        found = None if self.result is None else self.result.reconciliation
        return {"done": self._done, "images": self._images, "reconciliation": found}


def _experience_after(context: BatchContext, report: BatchReport, prices: dict[str, float]) -> Experience:
    """Prices and pace of all workers, for the next batch at this endpoint. In-flight limits stay each worker's own."""
    seconds = context.experience.seconds
    if report.billed_calls:
        seconds = report.seconds * min(context.account.max_in_flight, report.billed_calls) / report.billed_calls
    return context.experience.model_copy(update={"prices": {**context.experience.prices, **prices}, "seconds": seconds})
