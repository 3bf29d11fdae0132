"""The work of a batch: rows in, records out, a bounded number at once."""

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
from flux_prefect.api.pacing import Pacer
from flux_prefect.batch.interpreter import tuned_interpreter
from flux_prefect.batch.planning import PlannedBatch
from flux_prefect.batch.shutdown import run_with_grace
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.concurrency import for_each, limit_threads
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import Billed, FluxError, RunStopped
from flux_prefect.host.spool import Experience, Spool
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
)
from flux_prefect.manifest.report import BatchReport, Tally
from flux_prefect.money.budget import Budget, spending_from
from flux_prefect.pipeline import Density, StepRunner, produce_image, run_as_task
from flux_prefect.settings import current_settings
from flux_prefect.steps import recover
from flux_prefect.tables.table import Row

__all__ = ["MOST_IN_STEPS", "ROWS_A_CHUNK", "choose_density", "learn", "run_batch"]

MOST_IN_STEPS = 300
"""Rows with something to do up to which a batch runs in steps unless told: 900 task runs, which a page can show."""

ROWS_A_CHUNK = 100
_CHUNKS_AT_ONCE = 3  # while one is down to its last rows, two others keep every slot busy
_FILES_PER_ITEM = 4  # two locks, a connection, and the image
_FEWEST_THREADS = 8  # for S3 and the disk: three requests of 30 ms an image are 80 images a second
_OTHER_FILES = 256  # Prefect's own, boto3's connections, everything else


def choose_density(plan: Plan) -> Density:
    """The density for a batch that was not told one."""
    return "steps" if plan.requests + plan.paid <= MOST_IN_STEPS else "chunks"


async def run_batch(  # noqa: PLR0913 - keyword-only from the fifth on
    planned: PlannedBatch,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    budget: Budget,
    *,
    density: Density,
    on_record: Callable[[ItemRecord], None],
) -> BatchReport:
    """Carry every planned row through, and tell of each as it ends.

    At most `credentials.max_in_flight` paid calls are out at once; as many items again, or twice as many in several
    chunks, may be downloading or uploading meanwhile. Rows are read when their turn comes: memory does not grow with
    the table.
    A row that fails never stops the others, unless it fails for a reason that every row shares (a wrong key, no
    credits left, no bucket): then nothing more is sent, and the rest is recorded as failed for it.
    Once the budget has no room, the rows left are recorded as skipped, but for those that were paid for before.

    Where it is cancelled, nothing more is sent either; calls in flight are awaited, and their images published, for
    `FLUX_PREFECT_GRACE_SECONDS`; the rows left are recorded as failed, those that were cut off with the ids of their
    calls; then the cancellation goes on.

    Args:
        planned: the table, with what the plan found in the bucket.
        bucket: where to publish.
        credentials: who pays, and how many calls at once.
        budget: every paid call is reserved under it.
        density: how many task runs it takes. Objects, records and money are the same.
        on_record: called with every record, in the order of their ends.
    """
    batch = _Batch(planned, bucket, credentials, budget, on_record)
    _allow_open_files(_FILES_PER_ITEM * _CHUNKS_AT_ONCE * credentials.max_in_flight)
    threads = max(_FEWEST_THREADS, credentials.max_in_flight // 6)
    with spending_from(budget), tuned_interpreter(), limit_threads(threads):
        async with credentials.open_client():
            await run_with_grace(batch.run(density), budget.close, grace_seconds=current_settings().grace_seconds)
    return batch.report()


class Chunk:
    """Rows that are worked on within one task run. Prefect takes it for a plain value and looks for nothing in it."""

    def __init__(self, batch: _Batch, rows: list[Row]) -> None:
        self.batch = batch
        self.rows = rows

    def __str__(self) -> str:
        return f"rows {self.rows[0].number} to {self.rows[-1].number}"


@task(name="publish-chunk", task_run_name="{chunk}", cache_policy=NO_CACHE, persist_result=False, retries=0)
async def publish_chunk(chunk: Chunk) -> dict[str, int]:
    """Carry a chunk's rows through. Their own failures are records, not this task's; a killed one is simply run again.

    Returns:
        How many rows ended in each way, which is the state's message as well.
    """
    tally = await chunk.batch.carry_all(chunk.rows)
    told = tally.report()
    state: State[Any] = Completed(message=told.summary(), data=told.counts)
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
        self._stopped_by: FluxError | None = None
        self._at_work: dict[int, Row] = {}
        self._started = time.monotonic()

    def report(self) -> BatchReport:
        return self._tally.report(seconds=time.monotonic() - self._started, plan=self._planned.plan)

    async def run(self, density: Density) -> None:
        rows = self._planned.rows()
        try:
            if density == "steps":
                await for_each(rows, self._carry_in_steps, at_once=2 * self._credentials.max_in_flight)
            else:
                await for_each(self._chunks(rows), self._run_chunk, at_once=_CHUNKS_AT_ONCE)
        except asyncio.CancelledError:
            self._record_interrupted()
            for row in rows:
                self._record_settled(row)  # each is, as the budget is closed
            raise

    async def carry_all(self, rows: list[Row]) -> Tally:
        tally = Tally()

        async def carry(row: Row) -> None:
            tally.add(await self._carry(row, run_inline))

        await for_each(rows, carry, at_once=self._credentials.max_in_flight)
        return tally

    def _chunks(self, rows: Iterator[Row]) -> Iterator[list[Row]]:
        """At least a hundred rows each, but for the last; where little is to do, empty ones in between."""
        chunk: list[Row] = []
        while piece := list(itertools.islice(rows, ROWS_A_CHUNK)):
            chunk += [row for row in piece if not self._record_settled(row)]
            if len(chunk) < ROWS_A_CHUNK:
                yield []  # so that others get their turn
            else:
                yield chunk
                chunk = []
        yield chunk

    async def _run_chunk(self, rows: list[Row]) -> None:
        if rows:
            await publish_chunk(Chunk(self, rows))

    async def _carry_in_steps(self, row: Row) -> None:
        if not self._record_settled(row):
            await self._carry(row, run_as_task)

    def _record_settled(self, row: Row) -> bool:
        """Record a row that needs no work; tell whether it was one."""
        if row.request is None:
            record = record_invalid(row)
        elif found := self._planned.found.get(row.request.fingerprint(self._credentials.base_url)):
            record = record_unchanged(row, found)
        elif (reason := self._reason_to_stop()) is not None:
            record = record_stopped(row, reason)
        else:
            self._at_work[row.number] = row
            return False
        self._keep(record)
        return True

    def _record_interrupted(self) -> None:
        """Record the rows whose work was cut off, each with its calls that nobody awaits any more."""
        reason = RunStopped("Cut off: the run was cancelled, and its time to end was over. Run again.")
        for row in list(self._at_work.values()):
            assert row.request is not None  # noqa: S101 - rows without one are settled
            lost = self._spool.open_calls(row.request.fingerprint(self._credentials.base_url))
            owed = {
                "billed_and_lost": tuple(call.client_request_id for call in lost if call.billed is Billed.YES),
                "possibly_billed": tuple(call.client_request_id for call in lost if call.billed is Billed.UNKNOWN),
            }
            self._keep(record_failed(row, row.request, reason).model_copy(update=owed))

    def _reason_to_stop(self) -> FluxError | None:
        try:
            self._budget.check_open()
        except RunStopped as error:
            return error
        return self._stopped_by

    async def _carry(self, row: Row, run: StepRunner) -> ItemRecord:
        assert row.request is not None  # noqa: S101 - rows without one are settled
        return self._keep(await self._produce(row, row.request, run))

    async def _produce(self, row: Row, request: ImageRequest, run: StepRunner) -> ItemRecord:
        if (reason := self._reason_to_stop()) is not None:
            return record_stopped(row, reason)
        try:
            if not self._budget.has_room(request) and recover(request, self._credentials.base_url, self._spool) is None:
                return record_skipped(row)
            production = await produce_image(request, self._bucket, self._credentials, run=run)
        except Exception as error:  # noqa: BLE001 - whatever it was, the other rows go on
            return record_failed(row, request, error)
        if production.error is not None and production.error.fatal:
            self._stopped_by = self._stopped_by or production.error
        return record_production(row, production)

    def _keep(self, record: ItemRecord) -> ItemRecord:
        record = record.model_copy(update={"run": self._planned.run})
        self._at_work.pop(record.row, None)
        self._tally.add(record)
        self._on_record(record)
        return record


def _allow_open_files(needed: int) -> None:
    """Raise this process's soft limit where its own settings are what stands in the way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(needed + _OTHER_FILES, hard) if hard != resource.RLIM_INFINITY else needed + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def learn(known: Experience, report: BatchReport, budget: Budget, pacer: Pacer) -> Experience:
    """What the next batch at this endpoint can begin with: prices, pace and in-flight limit as this one found them."""
    seconds = known.seconds
    if report.billed_calls:
        seconds = report.seconds * min(pacer.limit, report.billed_calls) / report.billed_calls
    return Experience(prices={**known.prices, **budget.observed}, seconds=seconds, in_flight=pacer.learned_limit)
