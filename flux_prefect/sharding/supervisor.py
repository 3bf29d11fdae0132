"""Supervision of a batch in shards: start their runs, watch them, replace lost ones and merge the records.

The state of a batch is stored in three places that outlive this process: its tables in the bucket, the runs of its
shards in Prefect, and the manifest and final heartbeat of each run in the bucket. Any process that reads them can
continue where another one stopped.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

import anyio
import httpx
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import PrefectException

from flux_prefect.batch.context import BatchContext
from flux_prefect.bucket.object_operations import Version
from flux_prefect.display.progress import Logger, Progress
from flux_prefect.errors import BucketUnavailable, FluxError, RunStopped, ShardLost
from flux_prefect.manifest.merging import attribute_images, is_pending, mark_failed, merge_attempts
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.money.allocation import Allocation
from flux_prefect.money.ledger import Amount
from flux_prefect.money.reconciliation import Reconciliation
from flux_prefect.settings import current_settings
from flux_prefect.sharding.heartbeat import Heartbeat, heartbeat_object, mark_lost, parse_heartbeat
from flux_prefect.sharding.runs import ShardRun, ShardRuns
from flux_prefect.sharding.shards import Shard, Split, read_rows, settled_path, shard_path, write_attempt_table
from flux_prefect.tables.manifest_lines import read_records
from flux_prefect.tables.sources import open_source

__all__ = ["ShardingOptions", "Supervisor"]

MAX_RESTARTS = 5
"""How often a shard is started again after a lost run, before its rows are recorded as failed."""

_HEARTBEATS_PER_TIMEOUT = 10
_MAX_POLL_SECONDS = 2.0
_POLLS_PER_TIMEOUT = 40
_MAX_HEARTBEAT_SECONDS = 15.0
_WORKER_WARNING_SECONDS = 60.0
_MAX_OUTAGE_SECONDS = 600.0
_MERGE_SECONDS = 5.0  # of a stopped run's grace period
_ROWS_PER_YIELD = 100
_ACTIVE_STATES = {StateType.PENDING, StateType.RUNNING, StateType.CANCELLING}
_PATIENCE_FACTORS = {StateType.PENDING: 5}  # a machine that is being prepared sends no heartbeats yet
_End = Literal["completed", "failed", "lost"]


def heartbeat_seconds(lost_after: float) -> float:
    """Return the interval of heartbeats: ten within `lost_after` seconds, and at least one every 15 seconds."""
    return min(_MAX_HEARTBEAT_SECONDS, lost_after / _HEARTBEATS_PER_TIMEOUT)


@dataclass(frozen=True)
class ShardingOptions:
    """How a batch is spread over runs.

    Attributes:
        at_once: the most shards that run at the same time.
        lost_after: seconds without a heartbeat after which a run counts as lost.
        parameters: parameters of each shard's run, except its table, allowance and heartbeat interval.
        resize: called regularly with the calls at once that the service accepts over all shards together, or with None
            if that is unknown.
    """

    at_once: int
    lost_after: float
    parameters: Mapping[str, Any]
    resize: Callable[[int | None], Awaitable[None]]

    @property
    def poll_seconds(self) -> float:
        """Seconds between two polls of the runs' states: 2, or less where a lost run is noticed soon."""
        return min(_MAX_POLL_SECONDS, self.lost_after / _POLLS_PER_TIMEOUT)


@dataclass
class _Attempt:
    """A run of a shard, with its last heartbeat and state."""

    run: ShardRun
    last_version: Version | None = None
    state: UUID | None = None
    changed_at: float = field(default_factory=time.monotonic)
    adopted: bool = False
    warned: bool = False

    @property
    def heartbeat(self) -> Heartbeat:
        return parse_heartbeat(self.last_version) or Heartbeat()

    @property
    def final_heartbeat(self) -> Heartbeat | None:
        """The heartbeat that the run sent at its end, or None."""
        return self.heartbeat if self.heartbeat.ended and not self.heartbeat.lost else None

    @property
    def silence(self) -> float:
        """Seconds since its heartbeat or state was last seen to change."""
        return time.monotonic() - self.changed_at


@dataclass
class _ShardWork:
    """A shard and the progress of its attempts.

    Attributes:
        shard: the shard.
        attempts: its runs, in order.
        remaining: rows for the next attempt; None before the first attempt.
        unused: the part of the last allowance that could not be spent although rows remained.
        losses: number of its runs that were lost, as observed by this process.
        error: why its remaining rows fail, or None.
    """

    shard: Shard
    attempts: list[_Attempt] = field(default_factory=list)
    remaining: list[ItemRecord] | None = None
    unused: Amount | None = None
    losses: int = 0
    error: FluxError | None = None

    @property
    def name(self) -> str:
        return f"Shard {self.shard.number + 1}"


@dataclass
class Supervisor:
    """Supervisor of one batch in shards, from its current state to its end.

    Attributes:
        context: bucket, account, spool and budget; the caps apply to all attempts at all shards together.
        split: the batch and its shards.
        runs: the runs of the shards.
        options: how the batch is spread.
        on_record: called once with the record of every row, when it is final.
        progress: the progress of the batch.
        check_lease: raises if another process may have taken over the batch.
        logger: the run's logger.
        complete: whether every row ended by itself: no shard was abandoned or stopped.
        prices: the most credits that an image of each model cost.
    """

    context: BatchContext
    split: Split
    runs: ShardRuns
    options: ShardingOptions
    on_record: Callable[[ItemRecord], None]
    progress: Progress
    check_lease: Callable[[], None]
    logger: Logger
    complete: bool = field(default=True, init=False)
    prices: dict[str, float] = field(default_factory=dict, init=False)
    _allocation: Allocation = field(init=False)
    _waiting: list[_ShardWork] = field(default_factory=list, init=False)
    _running: list[_ShardWork] = field(default_factory=list, init=False)
    _recorded: Heartbeat = field(default_factory=Heartbeat, init=False)  # the sums of all final records
    _heartbeats_read_at: float = field(default=0.0, init=False)
    _reconciliations: list[Reconciliation] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._allocation = Allocation(self.context.budget.cap)

    async def run(self) -> None:
        """Supervise the shards until every row has its record.

        While the server or the bucket can't be reached, requests are repeated for up to ten minutes.

        Raises:
            asyncio.CancelledError: after the shards have been stopped and every row has its record.
            Exception: whatever `check_lease` raises. The shards keep running.
            PrefectException, httpx.HTTPError: Prefect's server does not answer, or refuses. The shards keep running,
                and the batch can be resumed.
            BucketError: the bucket can't be read or written. The shards keep running, and the batch can be resumed.
        """
        await self._record_settled()
        try:
            await self._adopt_runs()
            unreachable_since: float | None = None
            while self._running or self._waiting:
                self.check_lease()
                try:
                    await self._start_shards()
                    if self._running:
                        await asyncio.sleep(self.options.poll_seconds)
                        await self._poll()
                    unreachable_since = None
                except (BucketUnavailable, httpx.HTTPError) as error:
                    unreachable_since = unreachable_since or time.monotonic()
                    if not _is_transient(error) or time.monotonic() - unreachable_since > _MAX_OUTAGE_SECONDS:
                        raise
                    self.logger.warning("The shards can't be watched at the moment: %s", error)
                    await asyncio.sleep(self.options.poll_seconds)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await self._stop_shards()
            raise

    def reconciliation(self) -> Reconciliation | None:
        """Return the log's findings about lost calls of all shards together, or None if no call was lost."""
        if not self._reconciliations:
            return None
        return Reconciliation(
            billed={call: cost for found in self._reconciliations for call, cost in found.billed.items()},
            not_billed=tuple(call for found in self._reconciliations for call in found.not_billed),
            kept=tuple(call for found in self._reconciliations for call in found.kept),
            unknown=tuple(call for found in self._reconciliations for call in found.unknown),
            reason=next((found.reason for found in self._reconciliations if found.reason is not None), None),
        )

    async def _record_settled(self) -> None:
        address = f"{self.context.bucket.uri}/{settled_path(self.split.run)}"
        async with open_source(address, bucket=self.context.bucket, max_bytes=sys.maxsize) as source:
            with source.open() as file:
                for number, record in enumerate(read_records(file, source.name)):
                    self._record(ItemRecord.model_validate(record))
                    if number % _ROWS_PER_YIELD == 0:
                        await asyncio.sleep(0)

    async def _adopt_runs(self) -> None:
        """Adopt every run that was ever started for this batch as if it were running; a poll finds those that ended."""
        works = [_ShardWork(shard) for shard in self.split.shards]
        for run in await self.runs.find():
            works[run.shard].attempts.append(_Attempt(run, adopted=True))
            self._allocation.reserve((run.shard, run.attempt), run.allowance)
        self._running = [work for work in works if work.attempts]
        self._waiting = [work for work in works if not work.attempts]
        for work in self._running:
            for attempt in work.attempts:
                attempt.last_version = await heartbeat_object(self.context.bucket, str(attempt.run.id)).read()
                self._settle(attempt)
        await self._poll()
        if self._running:
            self.logger.info("Resuming: %d shards are running already", len(self._running))

    # Starting

    async def _start_shards(self) -> None:
        for work in list(self._waiting):
            if len(self._running) >= self.options.at_once:
                break
            if (allowance := self._allowance(work)) is not None:
                await self._start_attempt(work, allowance)
                self._waiting.remove(work)
                self._running.append(work)
        while self._waiting and not self._running:  # no run remains that could release a part of its allowance
            await self._finish_shard(self._waiting[0])
            del self._waiting[0]

    def _allowance(self, work: _ShardWork) -> Amount | None:
        if not work.shard.rows:
            return None
        allowance = self._allocation.allowance(work.shard.cost, len(self._waiting))
        if allowance is None or work.unused is None:
            return allowance
        more = allowance.credits > work.unused.credits or allowance.images > work.unused.images
        return allowance if more else None

    async def _start_attempt(self, work: _ShardWork, allowance: Amount) -> None:
        shard, number = work.shard.number, work.attempts[-1].run.attempt + 1 if work.attempts else 0
        if work.remaining is None:
            source = f"{self.context.bucket.uri}/{shard_path(self.split.run, shard, 0)}"
        else:
            source = await write_attempt_table(self.context.bucket, self.split.run, shard, number, work.remaining)
        self._allocation.reserve((shard, number), allowance)  # first: the run may exist although the answer was lost
        again = f", attempt {number + 1}" if number else ""
        run = await self.runs.start(
            shard,
            number,
            allowance,
            name=f"shard {shard + 1} of {len(self.split.shards)}{again}",
            parameters={
                **self.options.parameters,
                "source": source,
                "prices": self.context.budget.prices,
                "sign_seconds": heartbeat_seconds(self.options.lost_after),
            },
        )
        self._allocation.reserve((shard, number), run.allowance)
        work.attempts.append(_Attempt(run))
        work.remaining = None

    # Watching

    async def _poll(self) -> None:
        states = await self.runs.read_states([work.attempts[-1].run.id for work in self._running])
        if time.monotonic() - self._heartbeats_read_at >= heartbeat_seconds(self.options.lost_after):
            await self._read_heartbeats()
        for work in list(self._running):
            attempt = work.attempts[-1]
            state = states.get(attempt.run.id)
            end = await self._classify(work, attempt, state)
            if end is not None:
                await self._close_attempt(work, end, (state and state.message) or "")
                self._running.remove(work)

    async def _classify(self, work: _ShardWork, attempt: _Attempt, state: State[Any] | None) -> _End | None:
        """Return how an attempt ended, or None while it runs."""
        if state is None:
            return "lost"
        if state.is_final():
            if state.is_completed():
                return "completed"
            # The cause of a failure from before this process started may have been removed since.
            return "failed" if state.is_failed() and not attempt.adopted else "lost"
        if attempt.heartbeat.lost or await self._mark_lost_if_silent(attempt, state):
            self.logger.warning("%s sent no heartbeat: its run counts as lost", work.name)
            await self.runs.set_lost(attempt.run.id, "The run sent no heartbeat, and another run does its work.")
            return "lost"
        if state.is_scheduled() and not attempt.warned and attempt.silence > _WORKER_WARNING_SECONDS:
            attempt.warned = True
            self.logger.warning("%s waits for a worker: start one for the work pool of its deployment.", work.name)
        return None

    async def _read_heartbeats(self) -> None:
        for work in self._running:
            attempt = work.attempts[-1]
            try:
                latest = await heartbeat_object(self.context.bucket, str(attempt.run.id)).read()
            except BucketUnavailable as error:
                self.logger.warning("The heartbeats of %s can't be read: %s", work.name, error)
                attempt.changed_at = time.monotonic()  # the run may have sent heartbeats that could not be read
                continue
            if latest is not None and (attempt.last_version is None or latest.etag != attempt.last_version.etag):
                attempt.last_version, attempt.changed_at = latest, time.monotonic()
        self._heartbeats_read_at = time.monotonic()
        heartbeats = [self._recorded, *(work.attempts[-1].heartbeat for work in self._running)]
        self.progress.set_totals(
            done=sum(heartbeat.done for heartbeat in heartbeats),
            images=sum(heartbeat.images for heartbeat in heartbeats),
            spent=sum(heartbeat.credits_spent for heartbeat in heartbeats),
        )
        limits = [work.attempts[-1].heartbeat.in_flight for work in self._running]
        known = [number for number in limits if number is not None]
        # A shard that was never refused a call might use more than it has asked for.
        await self.options.resize(sum(known) if known and len(known) == len(limits) else None)

    async def _mark_lost_if_silent(self, attempt: _Attempt, state: State[Any]) -> bool:
        if state.id != attempt.state:
            attempt.state, attempt.changed_at = state.id, time.monotonic()
        patience = _PATIENCE_FACTORS.get(state.type, 1) * self.options.lost_after
        if state.type not in _ACTIVE_STATES or attempt.silence < patience:
            return False
        return await mark_lost(heartbeat_object(self.context.bucket, str(attempt.run.id)), attempt.last_version)

    # Ending

    async def _close_attempt(self, work: _ShardWork, end: _End, message: str = "") -> None:
        """Settle an attempt that has ended, and decide what happens to its remaining rows."""
        attempt = work.attempts[-1]
        await self._fetch_final_heartbeat(attempt)
        remaining = [record for record in (await self._merge(work)).values() if is_pending(record)]
        if not remaining:
            await self._finish_shard(work)
        elif end == "completed":
            spent = self._allocation.reserved[attempt.run.shard, attempt.run.attempt]
            allowance = attempt.run.allowance
            work.remaining = remaining
            work.unused = Amount(allowance.credits - spent.credits, allowance.images - spent.images)
            self._waiting.append(work)
        elif end == "failed":
            await self._abandon(work, ShardLost(f"Not published: the run of its shard failed. {message}"))
        elif work.losses == MAX_RESTARTS:
            await self._abandon(work, ShardLost(f"Not published: {MAX_RESTARTS + 1} runs of its shard were lost."))
        else:
            work.losses += 1
            work.remaining, work.unused = remaining, None
            self._waiting.insert(0, work)
            self.logger.warning("%s is started again, with the %d rows that remain", work.name, len(remaining))

    async def _fetch_final_heartbeat(self, attempt: _Attempt) -> None:
        """Read what an attempt that has ended spent. Without a final heartbeat, its whole allowance stays reserved."""
        target = heartbeat_object(self.context.bucket, str(attempt.run.id))
        attempt.last_version = await target.read()
        # A run without a final heartbeat may only be unreachable. Once it is marked, it can't continue.
        while (
            not attempt.heartbeat.ended
            and not attempt.heartbeat.lost
            and not await mark_lost(target, attempt.last_version)
        ):
            attempt.last_version = await target.read()
        self._settle(attempt)

    def _settle(self, attempt: _Attempt) -> None:
        last = attempt.final_heartbeat
        if last is None:
            return
        self._allocation.settle((attempt.run.shard, attempt.run.attempt), Amount(last.credits_spent, last.images_spent))
        for model, price in last.prices.items():
            self.prices[model] = max(price, self.prices.get(model, 0.0))
        if last.reconciliation is not None and last.reconciliation not in self._reconciliations:
            self._reconciliations.append(last.reconciliation)

    async def _merge(self, work: _ShardWork) -> dict[int, ItemRecord]:
        bucket = self.context.bucket
        table = await read_rows(bucket, shard_path(self.split.run, work.shard.number, 0))
        attempts = [await read_rows(bucket, f"manifests/{attempt.run.id}/manifest.jsonl") for attempt in work.attempts]
        return merge_attempts(table, attempts)

    async def _abandon(self, work: _ShardWork, error: FluxError) -> None:
        self.logger.error("%s is abandoned. %s", work.name, error.message)
        self.complete = False
        work.error = error
        await self._finish_shard(work)

    async def _finish_shard(self, work: _ShardWork) -> None:
        """Emit the records of a shard that has ended."""
        merged = await self._merge(work)
        if not all(attempt.final_heartbeat for attempt in work.attempts):
            runs = {str(attempt.run.id) for attempt in work.attempts}
            merged = await attribute_images(merged.values(), self.context.bucket, runs)
        for record in merged.values():
            self._record(record if work.error is None or not is_pending(record) else mark_failed(record, work.error))

    def _record(self, record: ItemRecord) -> None:
        self._recorded = self._recorded.model_copy(
            update={
                "done": self._recorded.done + 1,
                "images": self._recorded.images + sum(image.created for image in record.images),
                "credits_spent": self._recorded.credits_spent + record.credits_used,
            }
        )
        self.on_record(record)

    async def _stop_shards(self) -> None:
        """Stop all shards, wait until they have ended, and emit the records of all rows."""
        self.complete = False
        try:
            with anyio.move_on_after(max(0.0, current_settings().grace_seconds - _MERGE_SECONDS)):
                runs = [run.id for run in await self.runs.find()]  # one may have been started just now
                for run, state in (await self.runs.read_states(runs)).items():
                    if not state.is_final():
                        await self.runs.cancel(run)
                while not all(state.is_final() for state in (await self.runs.read_states(runs)).values()):  # noqa: ASYNC110 - Prefect's server has to be polled
                    await asyncio.sleep(self.options.poll_seconds / 4)
        except (PrefectException, httpx.HTTPError) as error:
            self.logger.warning("Shards may still be running, as they could not be stopped: %s", error)
        for work in [*self._running, *self._waiting]:
            work.error = RunStopped("Not published: the batch was stopped. Run again: what is published costs nothing.")
            await self._finish_shard(work)


def _is_transient(error: Exception) -> bool:
    """Whether repeating the request later may succeed."""
    return (
        not isinstance(error, httpx.HTTPStatusError) or error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
    )
