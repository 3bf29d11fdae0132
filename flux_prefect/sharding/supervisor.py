"""A batch in shards: started, followed, started again where they are lost, and merged.

All that is known of a batch stands in three places that outlive this process: its tables in the bucket, the runs of
its shards in Prefect, and what each run leaves of itself in the bucket (its manifest and its last sign). Whoever looks
at them goes on where another one has stopped.
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
from flux_prefect.money.allocation import Purse
from flux_prefect.money.budget import Amount
from flux_prefect.money.reconciliation import Reconciliation
from flux_prefect.settings import current_settings
from flux_prefect.sharding.heartbeat import Sign, read_sign, sign_of, take_for_lost
from flux_prefect.sharding.runs import ShardRun, ShardRuns
from flux_prefect.sharding.shards import Shard, Split, read_rows, settled_path, shard_path, write_attempt
from flux_prefect.tables.manifest_lines import read_records
from flux_prefect.tables.sources import open_source

__all__ = ["Following", "Pace"]

POLL_SECONDS = 2.0
"""Between two looks at the runs: one request for all of them."""

MOST_LOSSES = 5
"""How often a shard is started again after a run that was lost, before its rows are given up."""

_SIGNS_IN_SILENCE = 10
_LONGEST_SIGN_SECONDS = 15.0
_PICKED_UP_SECONDS = 60.0
_MOST_TROUBLE_SECONDS = 600.0
_MERGE_SECONDS = 5.0  # of the grace that a stopped run has
_ROWS_BETWEEN_BREATHS = 100
_AT_WORK = {StateType.PENDING, StateType.RUNNING, StateType.CANCELLING}
_STARTS = {StateType.PENDING: 5}  # times the patience for what makes machines ready, and gives no signs
_End = Literal["completed", "failed", "lost"]


def sign_seconds(lost_after: float) -> float:
    """How often a run is to give a sign, so that silence for `lost_after` seconds is no accident."""
    return min(_LONGEST_SIGN_SECONDS, lost_after / _SIGNS_IN_SILENCE)


@dataclass(frozen=True)
class Pace:
    """How the work is spread.

    Attributes:
        at_once: shards at work at a time.
        lost_after: seconds of silence after which a run is taken for lost.
        parameters: of each shard's run, but for its table, share and signs.
        resize: told now and then how many calls at once the service was seen to take, all shards together; None where
            that is not known.
    """

    at_once: int
    lost_after: float
    parameters: Mapping[str, Any]
    resize: Callable[[int | None], Awaitable[None]]


@dataclass
class _Attempt:
    """A run of a shard, with the last that was seen of it."""

    run: ShardRun
    seen: Version | None = None
    state: UUID | None = None
    changed_at: float = field(default_factory=time.monotonic)
    adopted: bool = False
    waited_for: bool = False

    @property
    def sign(self) -> Sign:
        return read_sign(self.seen) or Sign()

    @property
    def last_word(self) -> Sign | None:
        """What it said at its end, where it came to one."""
        return self.sign if self.sign.ended and not self.sign.lost else None

    @property
    def silence(self) -> float:
        """Seconds since something of it was seen to change."""
        return time.monotonic() - self.changed_at


@dataclass
class _Work:
    """A shard, and what became of it so far.

    Attributes:
        left: rows for the next attempt; None where that is the first one.
        unused: what the last attempt could not use although rows were left.
        losses: how many of its runs were lost, as far as this process has seen.
        error: why it was given up.
    """

    shard: Shard
    attempts: list[_Attempt] = field(default_factory=list)
    left: list[ItemRecord] | None = None
    unused: Amount | None = None
    losses: int = 0
    error: FluxError | None = None

    @property
    def name(self) -> str:
        return f"Shard {self.shard.number + 1}"


@dataclass
class Following:
    """One batch in shards, from wherever it stands to its end.

    Attributes:
        job: what the batch works with; its budget's caps are over all attempts at all shards.
        split: the batch.
        runs: of its shards.
        pace: how the work is spread.
        keep: called once with the record of every row, when nothing can change it any more.
        progress: of the batch.
        check: raises where somebody else may have gone on with this batch.
        logger: of the run.
        whole: whether every row has come to an end of its own: no shard was given up or stopped.
        prices: the most credits that an image of each model did cost.
    """

    job: BatchContext
    split: Split
    runs: ShardRuns
    pace: Pace
    keep: Callable[[ItemRecord], None]
    progress: Progress
    check: Callable[[], None]
    logger: Logger
    whole: bool = field(default=True, init=False)
    prices: dict[str, float] = field(default_factory=dict, init=False)
    _purse: Purse = field(init=False)
    _waiting: list[_Work] = field(default_factory=list, init=False)
    _running: list[_Work] = field(default_factory=list, init=False)
    _kept: Sign = field(default_factory=Sign, init=False)  # the sums of what was kept
    _signs_read_at: float = field(default=0.0, init=False)
    _found: list[Reconciliation] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._purse = Purse(self.job.budget.cap)

    async def follow(self) -> None:
        """Work until every row has its record.

        A server or a bucket that can't be reached is asked again for ten minutes.

        Raises:
            asyncio.CancelledError: after the shards were stopped too, and every row has its record.
            Exception: what `check` raises. The shards go on.
            PrefectException, httpx.HTTPError: Prefect's server does not answer, or refuses. The shards go on, and the
                batch can be followed again.
            BucketError: the bucket can't be read or written; the same holds.
        """
        await self._keep_settled()
        try:
            await self._adopt()
            trouble_since: float | None = None
            while self._running or self._waiting:
                self.check()
                try:
                    await self._start_some()
                    if self._running:
                        await asyncio.sleep(POLL_SECONDS)
                        await self._look()
                    trouble_since = None
                except (BucketUnavailable, httpx.HTTPError) as error:
                    trouble_since = trouble_since or time.monotonic()
                    if not _passes(error) or time.monotonic() - trouble_since > _MOST_TROUBLE_SECONDS:
                        raise
                    self.logger.warning("The shards can't be followed for now: %s", error)
                    await asyncio.sleep(POLL_SECONDS)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await self._stop()
            raise

    def reconciliation(self) -> Reconciliation | None:
        """What the service's log said of lost calls, all shards together; None where none were."""
        if not self._found:
            return None
        return Reconciliation(
            billed={call: cost for found in self._found for call, cost in found.billed.items()},
            not_billed=tuple(call for found in self._found for call in found.not_billed),
            kept=tuple(call for found in self._found for call in found.kept),
            unknown=tuple(call for found in self._found for call in found.unknown),
            reason=next((found.reason for found in self._found if found.reason is not None), None),
        )

    async def _keep_settled(self) -> None:
        address = f"{self.job.bucket.uri}/{settled_path(self.split.run)}"
        async with open_source(address, bucket=self.job.bucket, max_bytes=sys.maxsize) as source:
            with source.open() as file:
                for number, record in enumerate(read_records(file, source.name)):
                    self._keep_one(ItemRecord.model_validate(record))
                    if number % _ROWS_BETWEEN_BREATHS == 0:
                        await asyncio.sleep(0)

    async def _adopt(self) -> None:
        """Take up every run that was ever started for this batch, as if it were at work: a look tells."""
        works = [_Work(shard) for shard in self.split.shards]
        for run in await self.runs.find():
            works[run.shard].attempts.append(_Attempt(run, adopted=True))
            self._purse.give((run.shard, run.attempt), run.share)
        self._running = [work for work in works if work.attempts]
        self._waiting = [work for work in works if not work.attempts]
        for work in self._running:
            for attempt in work.attempts:
                attempt.seen = await sign_of(self.job.bucket, str(attempt.run.id)).read()
                self._settle(attempt)
        await self._look()
        if self._running:
            self.logger.info("%d shards are at work already, and are followed", len(self._running))

    # Starting

    async def _start_some(self) -> None:
        for work in list(self._waiting):
            if len(self._running) >= self.pace.at_once:
                break
            if (share := self._share(work)) is not None:
                await self._start(work, share)
                self._waiting.remove(work)
                self._running.append(work)
        while self._waiting and not self._running:  # nobody is left who could give something back
            await self._finish(self._waiting[0])
            del self._waiting[0]

    def _share(self, work: _Work) -> Amount | None:
        if not work.shard.rows:
            return None
        share = self._purse.share(work.shard.need, len(self._waiting))
        if share is None or work.unused is None:
            return share
        more = share.credits > work.unused.credits or share.images > work.unused.images
        return share if more else None

    async def _start(self, work: _Work, share: Amount) -> None:
        shard, number = work.shard.number, work.attempts[-1].run.attempt + 1 if work.attempts else 0
        if work.left is None:
            source = f"{self.job.bucket.uri}/{shard_path(self.split.run, shard, 0)}"
        else:
            source = await write_attempt(self.job.bucket, self.split.run, shard, number, work.left)
        self._purse.give((shard, number), share)  # first: the run may be there although its answer is lost
        again = f", attempt {number + 1}" if number else ""
        run = await self.runs.start(
            shard,
            number,
            share,
            name=f"shard {shard + 1} of {len(self.split.shards)}{again}",
            parameters={
                **self.pace.parameters,
                "source": source,
                "prices": self.job.known.prices,
                "sign_seconds": sign_seconds(self.pace.lost_after),
            },
        )
        self._purse.give((shard, number), run.share)
        work.attempts.append(_Attempt(run))
        work.left = None

    # Following

    async def _look(self) -> None:
        states = await self.runs.look([work.attempts[-1].run.id for work in self._running])
        if time.monotonic() - self._signs_read_at >= sign_seconds(self.pace.lost_after):
            await self._read_signs()
        for work in list(self._running):
            attempt = work.attempts[-1]
            state = states.get(attempt.run.id)
            end = await self._judge(work, attempt, state)
            if end is not None:
                await self._end(work, end, (state and state.message) or "")
                self._running.remove(work)

    async def _judge(self, work: _Work, attempt: _Attempt, state: State[Any] | None) -> _End | None:
        """How an attempt has ended; None where it goes on."""
        if state is None:
            return "lost"
        if state.is_final():
            if state.is_completed():
                return "completed"
            # What failed before this process began may have been put right since.
            return "failed" if state.is_failed() and not attempt.adopted else "lost"
        if attempt.sign.lost or await self._is_lost(attempt, state):
            self.logger.warning("%s was silent: its run is taken for lost", work.name)
            await self.runs.declare_lost(attempt.run.id, "It was silent, and another run does its work.")
            return "lost"
        if state.is_scheduled() and not attempt.waited_for and attempt.silence > _PICKED_UP_SECONDS:
            attempt.waited_for = True
            self.logger.warning("%s waits for a worker: start one for the work pool of its deployment.", work.name)
        return None

    async def _read_signs(self) -> None:
        for work in self._running:
            attempt = work.attempts[-1]
            try:
                latest = await sign_of(self.job.bucket, str(attempt.run.id)).read()
            except BucketUnavailable as error:
                self.logger.warning("The signs of %s can't be read: %s", work.name, error)
                attempt.changed_at = time.monotonic()  # nobody was silent, as far as is known
                continue
            if latest is not None and (attempt.seen is None or latest.etag != attempt.seen.etag):
                attempt.seen, attempt.changed_at = latest, time.monotonic()
        self._signs_read_at = time.monotonic()
        signs = [self._kept, *(work.attempts[-1].sign for work in self._running)]
        self.progress.set_totals(
            done=sum(sign.done for sign in signs),
            images=sum(sign.images for sign in signs),
            spent=sum(sign.credits_spent for sign in signs),
        )
        taken = [work.attempts[-1].sign.in_flight for work in self._running]
        known = [number for number in taken if number is not None]
        # A shard that was never refused a call could have more than it asked for.
        await self.pace.resize(sum(known) if known and len(known) == len(taken) else None)

    async def _is_lost(self, attempt: _Attempt, state: State[Any]) -> bool:
        if state.id != attempt.state:
            attempt.state, attempt.changed_at = state.id, time.monotonic()
        patience = _STARTS.get(state.type, 1) * self.pace.lost_after
        if state.type not in _AT_WORK or attempt.silence < patience:
            return False
        return await take_for_lost(sign_of(self.job.bucket, str(attempt.run.id)), attempt.seen)

    # Ending

    async def _end(self, work: _Work, end: _End, message: str = "") -> None:
        """Take in an attempt that is over."""
        attempt = work.attempts[-1]
        await self._hear_last_word(attempt)
        left = [record for record in (await self._merge(work)).values() if is_pending(record)]
        if not left:
            await self._finish(work)
        elif end == "completed":
            spent = self._purse.taken[attempt.run.shard, attempt.run.attempt]
            share = attempt.run.share
            work.left, work.unused = left, Amount(share.credits - spent.credits, share.images - spent.images)
            self._waiting.append(work)
        elif end == "failed":
            await self._give_up(work, ShardLost(f"Not published: the run of its shard failed. {message}"))
        elif work.losses == MOST_LOSSES:
            await self._give_up(work, ShardLost(f"Not published: {MOST_LOSSES + 1} runs of its shard were lost."))
        else:
            work.losses += 1
            work.left, work.unused = left, None
            self._waiting.insert(0, work)
            self.logger.warning("%s is started again, with the %d rows that are left", work.name, len(left))

    async def _hear_last_word(self, attempt: _Attempt) -> None:
        """Learn what an attempt that is over has spent: what it says itself, else all that it was given."""
        place = sign_of(self.job.bucket, str(attempt.run.id))
        attempt.seen = await place.read()
        # Who said nothing at the end may be out of sight only. From here on it can't go on.
        while not attempt.sign.ended and not attempt.sign.lost and not await take_for_lost(place, attempt.seen):
            attempt.seen = await place.read()
        self._settle(attempt)

    def _settle(self, attempt: _Attempt) -> None:
        last = attempt.last_word
        if last is None:
            return
        self._purse.settle((attempt.run.shard, attempt.run.attempt), Amount(last.credits_spent, last.images_spent))
        for model, price in last.prices.items():
            self.prices[model] = max(price, self.prices.get(model, 0.0))
        if last.reconciliation is not None and last.reconciliation not in self._found:
            self._found.append(last.reconciliation)

    async def _merge(self, work: _Work) -> dict[int, ItemRecord]:
        bucket = self.job.bucket
        table = await read_rows(bucket, shard_path(self.split.run, work.shard.number, 0))
        told = [await read_rows(bucket, f"manifests/{attempt.run.id}/manifest.jsonl") for attempt in work.attempts]
        return merge_attempts(table, told)

    async def _give_up(self, work: _Work, error: FluxError) -> None:
        self.logger.error("%s is given up. %s", work.name, error.message)
        self.whole = False
        work.error = error
        await self._finish(work)

    async def _finish(self, work: _Work) -> None:
        """Keep the records of a shard that is over."""
        merged = await self._merge(work)
        if not all(attempt.last_word for attempt in work.attempts):
            runs = {str(attempt.run.id) for attempt in work.attempts}
            merged = await attribute_images(merged.values(), self.job.bucket, runs)
        for record in merged.values():
            self._keep_one(record if work.error is None or not is_pending(record) else mark_failed(record, work.error))

    def _keep_one(self, record: ItemRecord) -> None:
        self._kept = self._kept.model_copy(
            update={
                "done": self._kept.done + 1,
                "images": self._kept.images + sum(image.created for image in record.images),
                "credits_spent": self._kept.credits_spent + record.credits_used,
            }
        )
        self.keep(record)

    async def _stop(self) -> None:
        """Stop all shards, wait for their ends, and keep what there is."""
        self.whole = False
        try:
            with anyio.move_on_after(max(0.0, current_settings().grace_seconds - _MERGE_SECONDS)):
                runs = [run.id for run in await self.runs.find()]  # one may have been started at this very moment
                for run, state in (await self.runs.look(runs)).items():
                    if not state.is_final():
                        await self.runs.cancel(run)
                while not all(state.is_final() for state in (await self.runs.look(runs)).values()):  # noqa: ASYNC110 - Prefect has to be asked
                    await asyncio.sleep(POLL_SECONDS / 4)
        except (PrefectException, httpx.HTTPError) as error:
            self.logger.warning("Shards may be at work still, as they could not be stopped: %s", error)
        for work in [*self._running, *self._waiting]:
            work.error = RunStopped("Not published: the batch was stopped. Run again: what is published costs nothing.")
            await self._finish(work)


def _passes(error: Exception) -> bool:
    """Whether it may be otherwise in a while."""
    return (
        not isinstance(error, httpx.HTTPStatusError) or error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
    )
