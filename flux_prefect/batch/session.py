"""The life of one batch around its engine: manifest, progress, pace and reconciliation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flux_prefect.api.pacing import Pacer, shared_pacer
from flux_prefect.batch.context import BatchContext
from flux_prefect.batch.engine import run_rows
from flux_prefect.batch.planning import PlannedBatch
from flux_prefect.batch.settlement import Settlement
from flux_prefect.batch.shutdown import sigterm_as_cancellation
from flux_prefect.display.artifacts import live_progress
from flux_prefect.display.progress import Logger, Progress, show_progress
from flux_prefect.host.spool import Experience
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.manifest.writer import ManifestWriter
from flux_prefect.money.reconciliation import Reconciliation
from flux_prefect.pipeline import Density

__all__ = ["BatchResult", "execute_batch", "resume_pace"]


@dataclass(frozen=True)
class BatchResult:
    """The outcome of a batch.

    Attributes:
        report: the report, with the manifest's address and with lost calls settled by the service's log.
        reconciliation: the log's findings about lost calls, or None if no call was lost.
    """

    report: BatchReport
    reconciliation: Reconciliation | None


async def execute_batch(  # noqa: PLR0913 - keyword-only from the fourth on
    context: BatchContext,
    planned: PlannedBatch,
    manifest: ManifestWriter,
    *,
    density: Density,
    on_record: Callable[[ItemRecord], None],
    logger: Logger,
) -> BatchResult:
    """Execute every planned row and return the report.

    Every record is in the manifest before `on_record` receives it. Progress is shown meanwhile, in the log and in the
    enclosing flow run's artifacts. Calls whose answers were lost are looked up in the service's log at the end, and the
    records of their rows written again with what was found. The
    pace starts from this host's last batch at the endpoint, and what this batch observes is stored for the next one.

    Args:
        context: bucket, account, spool and budget of the batch.
        planned: the table and its plan.
        manifest: the run's manifest; opened and closed here.
        density: steps or chunks.
        on_record: called with every record, in the order in which rows end.
        logger: the run's logger.

    Raises:
        TerminationSignal: the process received a SIGTERM. Images of calls in flight are published, and the manifest is
            whole.
        BucketError, ManifestUnwritable: the manifest can't be written.
    """
    pacer = resume_pace(context)
    progress = Progress.of(planned.plan)
    settlement = Settlement(context)
    with sigterm_as_cancellation():
        async with manifest, live_progress(progress, logger):
            if planned.plan.requests:
                await manifest.verify_upload()
            with show_progress(progress, logger) as show:

                def record_row(record: ItemRecord) -> None:
                    manifest.append(record)
                    settlement.add(record)
                    show(record)
                    on_record(record)

                report = await run_rows(
                    planned, context.bucket, context.account, context.budget, density=density, on_record=record_row
                )
            found = await settlement.settle()
            for record in settlement.changed:
                manifest.append(record)
    report = report.model_copy(update={"manifest": manifest.uri, "records": manifest.path})
    report = report.include_attempts(context.budget.ledger, found)
    if found is not None:
        logger.warning("%s", report.reconciled)
    context.spool.keep_experience(context.account.base_url, _experience_after(context, report, pacer))
    return BatchResult(report, found)


def resume_pace(context: BatchContext) -> Pacer:
    """Return the account's pacer, starting where this host's last batch at the endpoint ended."""
    account = context.account
    pacer = shared_pacer(account.base_url, account.api_key, account.max_in_flight)
    if context.experience.in_flight is not None and pacer.ceiling is None:
        pacer.resume(context.experience.in_flight)
    return pacer


def _experience_after(context: BatchContext, report: BatchReport, pacer: Pacer) -> Experience:
    """Prices, pace and in-flight limit that the next batch at this endpoint starts from."""
    seconds = context.experience.seconds
    if report.billed_calls and not context.budget.ledger.is_continued:  # else earlier attempts' calls are among them
        seconds = report.seconds * min(pacer.limit, report.billed_calls) / report.billed_calls
    prices = {**context.experience.prices, **context.budget.observed}
    return Experience(prices=prices, seconds=seconds, in_flight=pacer.learned_limit)
