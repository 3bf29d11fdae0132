"""The engine of a batch: rows in, records out, a bounded number at once."""

from __future__ import annotations

import asyncio
import itertools
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flux_prefect.api.models import ImageRequest
from flux_prefect.batch.circuit_breaker import CircuitBreaker
from flux_prefect.batch.interpreter import tuned_interpreter
from flux_prefect.batch.planning import PlannedBatch
from flux_prefect.batch.shutdown import run_with_grace
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.concurrency import for_each, limit_threads
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import recover
from flux_prefect.errors import Billed, FluxError, RunStopped
from flux_prefect.host.spool import Spool
from flux_prefect.inline import run_inline
from flux_prefect.manifest.plan import Plan
from flux_prefect.manifest.records import (
    ItemRecord,
    record_failed,
    record_invalid,
    record_production,
    record_skipped,
    record_stopped,
    record_unchanged,
    sums_of_attempts,
)
from flux_prefect.manifest.report import BatchReport, Tally
from flux_prefect.money.budget import Budget, spending_from
from flux_prefect.money.ledger import paying_for_row
from flux_prefect.pipeline import Density, StepRunner, produce_image, run_as_task
from flux_prefect.settings import current_settings
from flux_prefect.tables.table import Row

__all__ = ["MAX_ROWS_IN_STEPS", "ROWS_PER_CHUNK", "choose_density", "run_rows"]

MAX_ROWS_IN_STEPS = 300
"""Most rows with work to do that a batch runs in steps by default: 900 task runs, as many as one page can show."""

ROWS_PER_CHUNK = 100
"""Rows of one task run in chunks."""

_CHUNKS_AT_ONCE = 3  # while one chunk finishes its last rows, two others use the free slots
_FILES_PER_ROW = 4  # two locks, a connection and the image
_MIN_THREADS = 8  # for S3 and the disk: at three requests of 30 ms an image, 80 images a second
_OTHER_FILES = 256  # Prefect's files, boto3's connections and everything else


def choose_density(plan: Plan) -> Density:
    """Return the default density for a plan: steps for up to `MAX_ROWS_IN_STEPS` rows with work to do, else chunks."""
    return "steps" if plan.requests + plan.paid <= MAX_ROWS_IN_STEPS else "chunks"


async def run_rows(  # noqa: PLR0913 - keyword-only from the fifth on
    planned: PlannedBatch,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    budget: Budget,
    *,
    density: Density,
    on_record: Callable[[ItemRecord], None],
) -> BatchReport:
    """Process every planned row and emit one record a row.

    At most `credentials.max_in_flight` paid calls are in flight at once. As many other rows (in chunks, up to twice as
    many) may be downloading or uploading meanwhile. Rows are read when they are due: memory does not grow with the
    table.
    A row that fails never stops the others, unless the cause is shared by every row (a wrong key, no credits left, no
    bucket): then nothing more is sent, and the remaining rows are recorded as failed with that cause.
    Once the budget has no room, the remaining rows are recorded as skipped, except those that were paid for before.

    On cancellation, nothing more is sent either. Calls in flight are awaited and their images published for up to
    `FLUX_PREFECT_GRACE_SECONDS`; the remaining rows are recorded as failed, interrupted ones with the ids of their
    calls; then the cancellation is raised.

    Args:
        planned: the table, with what the plan found in the bucket.
        bucket: the bucket to publish to.
        credentials: the account that pays, and its limit of calls at once.
        budget: every paid call is reserved under it.
        density: steps or chunks. Objects, records and costs are the same.
        on_record: called with every record, in the order in which rows end.
    """
    batch = _Batch(planned, bucket, credentials, budget, on_record)
    _allow_open_files(_FILES_PER_ROW * _CHUNKS_AT_ONCE * credentials.max_in_flight)
    threads = max(_MIN_THREADS, credentials.max_in_flight // 6)
    with spending_from(budget), tuned_interpreter(), limit_threads(threads):
        async with credentials.open_client():
            await run_with_grace(batch.run(density), budget.close, grace_seconds=current_settings().grace_seconds)
    return batch.report()


class Chunk:
    """Rows that one task run processes. An opaque value for Prefect, which searches parameters for futures."""

    def __init__(self, batch: _Batch, rows: list[Row]) -> None:
        self.batch = batch
        self.rows = rows

    def __str__(self) -> str:
        return f"rows {self.rows[0].number} to {self.rows[-1].number}"


@task(name="publish-chunk", task_run_name="{chunk}", cache_policy=NO_CACHE, persist_result=False, retries=0)
async def publish_chunk(chunk: Chunk) -> dict[str, int]:
    """Process the rows of a chunk.

    A row's failure is recorded and does not fail the task. A task that was killed is run again from the start.

    Returns:
        The number of rows by status. The state's message holds the same counts.
    """
    tally = await chunk.batch.run_all(chunk.rows)
    report = tally.report()
    state: State[Any] = Completed(message=report.summary(), data=report.counts)
    return cast("dict[str, int]", state)


class _Batch:
    """A batch that is running."""

    def __init__(
        self,
        planned: PlannedBatch,
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        budget: Budget,
        on_record: Callable[[ItemRecord], None],
    ) -> None:
        self._planned = planned
        self._bucket = bucket
        self._credentials = credentials
        self._budget = budget
        self._on_record = on_record
        self._spool = Spool()
        self._tally = Tally()
        self._breaker = CircuitBreaker()
        self._active: dict[int, Row] = {}
        self._started = time.monotonic()

    def report(self) -> BatchReport:
        return self._tally.report(seconds=time.monotonic() - self._started, plan=self._planned.plan)

    async def run(self, density: Density) -> None:
        rows = self._planned.rows()
        try:
            if density == "steps":
                await for_each(rows, self._run_in_steps, at_once=2 * self._credentials.max_in_flight)
            else:
                await for_each(self._chunks(rows), self._run_chunk, at_once=_CHUNKS_AT_ONCE)
        except asyncio.CancelledError:
            self._record_interrupted()
            for row in rows:
                self._record_settled(row)  # every row is settled now: the budget is closed
            raise

    async def run_all(self, rows: list[Row]) -> Tally:
        tally = Tally()

        async def run_row(row: Row) -> None:
            tally.add(await self._run_row(row, run_inline))

        await for_each(rows, run_row, at_once=self._credentials.max_in_flight)
        return tally

    def _chunks(self, rows: Iterator[Row]) -> Iterator[list[Row]]:
        """Yield rows with work to do, `ROWS_PER_CHUNK` or more at a time except the last; empty lists in between."""
        chunk: list[Row] = []
        while piece := list(itertools.islice(rows, ROWS_PER_CHUNK)):
            chunk += [row for row in piece if not self._record_settled(row)]
            if len(chunk) < ROWS_PER_CHUNK:
                yield []  # lets the event loop run
            else:
                yield chunk
                chunk = []
        yield chunk

    async def _run_chunk(self, rows: list[Row]) -> None:
        if rows:
            await publish_chunk(Chunk(self, rows))

    async def _run_in_steps(self, row: Row) -> None:
        if not self._record_settled(row):
            await self._run_row(row, run_as_task)

    def _record_settled(self, row: Row) -> bool:
        """Record a row that needs no work. Returns False for a row that does."""
        if row.request is None:
            record = record_invalid(row)
        elif found := self._planned.found.get(row.request.fingerprint(self._credentials.base_url)):
            record = record_unchanged(row, found)
        elif (reason := self._reason_to_stop()) is not None:
            record = record_stopped(row, reason)
        else:
            self._active[row.number] = row
            return False
        self._emit(record)
        return True

    def _record_interrupted(self) -> None:
        """Record the rows whose work was interrupted, each with the ids of its calls in flight."""
        reason = RunStopped("Interrupted: the run was cancelled, and the grace period is over. Run again.")
        for row in list(self._active.values()):
            assert row.request is not None  # noqa: S101 - rows without one are settled
            lost = self._spool.open_calls(row.request.fingerprint(self._credentials.base_url))
            owed = {
                "billed_and_lost": tuple(call.client_request_id for call in lost if call.billed is Billed.YES),
                "possibly_billed": tuple(call.client_request_id for call in lost if call.billed is Billed.UNKNOWN),
            }
            self._emit(record_failed(row, row.request, reason).model_copy(update=owed))

    def _reason_to_stop(self) -> FluxError | None:
        try:
            self._budget.check_open()
        except RunStopped as error:
            return error
        return self._breaker.reason

    async def _run_row(self, row: Row, run: StepRunner) -> ItemRecord:
        assert row.request is not None  # noqa: S101 - rows without one are settled
        return self._emit(await self._produce(row, row.request, run))

    async def _produce(self, row: Row, request: ImageRequest, run: StepRunner) -> ItemRecord:
        if (reason := self._reason_to_stop()) is not None:
            return record_stopped(row, reason)
        try:
            with paying_for_row(row.number):
                return await self._pay(row, request, run)
        except Exception as error:  # noqa: BLE001 - any failure of a row leaves the other rows running
            return record_failed(row, request, error)

    async def _pay(self, row: Row, request: ImageRequest, run: StepRunner) -> ItemRecord:
        if not self._budget.has_room(request) and recover(request, self._credentials.base_url, self._spool) is None:
            return record_skipped(row)
        production = await produce_image(request, self._bucket, self._credentials, run=run)
        self._breaker.record(production.error)
        return record_production(row, production)

    def _emit(self, record: ItemRecord) -> ItemRecord:
        ledger = self._budget.ledger
        sums = sums_of_attempts(record, ledger, ledger.row(record.row))
        record = record.model_copy(update={**sums, "run": self._planned.run})
        self._active.pop(record.row, None)
        self._tally.add(record)
        self._on_record(record)
        return record


def _allow_open_files(needed: int) -> None:
    """Raise this process's soft limit of open files to what is needed, as far as its hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(needed + _OTHER_FILES, hard) if hard != resource.RLIM_INFINITY else needed + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
