"""The event of a batch's end, sent once whatever the end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.events.worker import EventsWorker
from prefect.runtime import flow_run

from flux_prefect.batch.shutdown import is_cancelling
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.events import End, Outcome, emit_batch_events
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport, Tally
from flux_prefect.money.ledger import Ledger

__all__ = ["BatchEnd", "batch_end"]

_FLUSH_SECONDS = 3.0
_OUTCOMES: dict[StateType, Outcome] = {
    StateType.COMPLETED: "completed",
    StateType.FAILED: "failed",
    StateType.CANCELLED: "cancelled",
    StateType.CRASHED: "crashed",
}


class BatchEnd:
    """What is known of a batch when it ends. The flow sets it as soon as it knows.

    Attributes:
        bucket: the bucket of the images, or what was given for it.
        run: id of the batch; part of its manifest's key.
        manifest: the address of the manifest, once it was opened.
        ledger: the run's ledger, once it was opened.
        report: the whole report, once every row has ended. Before that the event has the sums of the rows so far.
    """

    def __init__(self, bucket: ImageBucket | str) -> None:
        self.bucket = bucket
        self.run = str(flow_run.id)
        self.manifest: str | None = None
        self.report: BatchReport | None = None
        self.state: State[Any] | None = None
        self.ledger: Ledger | None = None
        self._tally = Tally()

    def add(self, record: ItemRecord) -> None:
        """Count a row that has ended."""
        self._tally.add(record)

    def with_state(self, state: State[Any]) -> State[Any]:
        """Set the state that the run ends with, and return it."""
        self.state = state
        return state

    def emit(self, outcome: Outcome, message: str, reason: str | None) -> None:
        """Send the event."""
        report = self.report
        if report is None:
            report = self._tally.report().model_copy(update={"manifest": self.manifest})
            if self.ledger is not None:
                report = report.include_attempts(self.ledger)
        end = End(
            outcome=outcome,
            reason=reason,
            message=message,
            attempt=flow_run.run_count or 1,
            final=outcome != "failed" or not _will_be_retried(),
        )
        emit_batch_events(report, self.bucket, self.run, end)


@asynccontextmanager
async def batch_end(bucket: ImageBucket | str, *, dry_run: bool) -> AsyncIterator[BatchEnd]:
    """Send `flux.batch.finished` once when the block ends: by its state, by an error, or by a signal.

    A block that ends without a state and without an exception sends nothing, and neither does a dry run. Where the
    process is about to end, the event is given up to three seconds to leave it.

    Args:
        bucket: the bucket as the flow was given it.
        dry_run: whether only the plan is made.
    """
    end = BatchEnd(bucket)
    try:
        yield end
    except BaseException as error:
        if not dry_run:
            with anyio.CancelScope(shield=True):
                if isinstance(error, Exception):
                    end.emit("failed", str(error) or repr(error), type(error).__name__)
                else:
                    outcome: Outcome = "cancelled" if await is_cancelling(str(flow_run.id)) else "crashed"
                    end.emit(outcome, f"The run was stopped ({type(error).__name__}).", "RunStopped")
                    await _flush()
        raise
    if end.state is not None and not dry_run:
        outcome = _OUTCOMES[end.state.type]
        reason = "BatchFailed" if outcome == "failed" else None
        end.emit(outcome, end.state.message or "", reason)
        if outcome == "cancelled":
            with anyio.CancelScope(shield=True):
                await _flush()


def _will_be_retried() -> bool:
    """Whether Prefect runs the flow again where this attempt fails."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return False
    return (context.flow_run.run_count or 1) <= (context.flow_run.empirical_policy.retries or 0)


async def _flush() -> None:
    """Wait until Prefect's queue of events is sent: the process may end without waiting for it."""
    with anyio.move_on_after(_FLUSH_SECONDS):
        await anyio.to_thread.run_sync(EventsWorker.instance().wait_until_empty, abandon_on_cancel=True)
