"""The middle of every batch: a planned table is carried through, with its manifest, its progress and its pace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flux_prefect.api.pacing import Pacer, shared_pacer
from flux_prefect.batch.context import BatchContext
from flux_prefect.batch.engine import learn, run_batch
from flux_prefect.batch.planning import PlannedBatch
from flux_prefect.batch.shutdown import sigterm_as_cancellation
from flux_prefect.display.artifacts import live_progress
from flux_prefect.display.progress import Logger, Progress, show_progress
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.manifest.writer import ManifestWriter
from flux_prefect.money.reconciliation import Reconciliation, reconcile
from flux_prefect.pipeline import Density

__all__ = ["Carried", "carry_through", "resume_pace"]


@dataclass(frozen=True)
class Carried:
    """What became of a batch.

    Attributes:
        report: with the manifest's address, and with lost calls told as the service's log has them.
        reconciliation: what that log said; None where no call was lost.
    """

    report: BatchReport
    reconciliation: Reconciliation | None


async def carry_through(  # noqa: PLR0913 - keyword-only from the fourth on
    job: BatchContext,
    planned: PlannedBatch,
    manifest: ManifestWriter,
    *,
    density: Density,
    on_record: Callable[[ItemRecord], None],
    logger: Logger,
) -> Carried:
    """Carry every planned row through, at the pace that this host has learnt, and keep what it learns.

    Every record is in the manifest before anybody else is told of it. Progress is shown meanwhile, here and in the
    enclosing flow run's artifacts. Calls whose answers were lost are looked up in the service's log at the end.

    Args:
        job: what the batch works with.
        planned: the table and its plan.
        manifest: of this run; opened and closed here.
        density: how many task runs it takes.
        on_record: called with every record, in the order of their ends.
        logger: of the run.

    Raises:
        TerminationSignal: the process was told to end. What was in flight is published, and the manifest is whole.
        BucketError, ManifestUnwritable: the manifest can't be kept.
    """
    pacer = resume_pace(job)
    progress = Progress.of(planned.plan)
    with sigterm_as_cancellation():
        async with manifest, live_progress(progress, logger):
            if planned.plan.requests:
                await manifest.verify_upload()
            with show_progress(progress, logger) as tell:

                def keep(record: ItemRecord) -> None:
                    manifest.append(record)
                    tell(record)
                    on_record(record)

                report = await run_batch(planned, job.bucket, job.account, job.budget, density=density, on_record=keep)
    report = report.model_copy(update={"manifest": manifest.uri, "records": manifest.path})
    found: Reconciliation | None = None
    unsettled = [call for call in job.spool.open_calls() if call.client_request_id in report.possibly_billed]
    if unsettled:
        found = await reconcile(job.client, job.spool, calls=unsettled)
        report = report.settle(found)
        logger.warning("%s", report.reconciled)
    job.spool.keep_experience(job.account.base_url, learn(job.known, report, job.budget, pacer))
    return Carried(report, found)


def resume_pace(job: BatchContext) -> Pacer:
    """The account's pacer, which begins where this host's last batch at the endpoint had ended."""
    pacer = shared_pacer(job.account.base_url, job.account.max_in_flight)
    if job.known.in_flight is not None and pacer.ceiling is None:
        pacer.resume(job.known.in_flight)
    return pacer
