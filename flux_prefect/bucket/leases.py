"""Leases in the bucket, so that one machine at a time makes an image.

A lease is a small object in the bucket, written with conditional requests. Redis is not used: it is one more server to
run, and the lock in Prefect's own integration is never released by async code. A lease guards a paid call of seconds to
minutes, against which the cost of three or four S3 requests is negligible. Any account that may publish may hold a
lease; it also needs s3:DeleteObject.

No clocks are compared. Every write gives the object a new ETag. The holder rewrites the object every third of
`lease_seconds`, and remains the holder until nine tenths of `lease_seconds` after it *began* the last write that
succeeded. A waiter takes the lease over, by a write conditional on that ETag, once it has itself seen the ETag
unchanged for all of `lease_seconds`. By then the holder has given up by its own clock. The clocks must run at the same
pace, within a tenth. They go on while a machine sleeps. A virtual machine that is halted from outside may not notice,
and can then send the one call that it was about to send, but can't renew or publish.

After a holder dies, its object blocks others for at most `lease_seconds`. In a bucket that keeps old versions every
lease leaves one: let them expire by a lifecycle rule on `leases/`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux_prefect.bucket.conditional_object import ConditionalObject
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.object_operations import Version
from flux_prefect.errors import BucketError, BucketUnavailable, KeyOccupied, LeaseLost

__all__ = ["BucketLeases", "Lease", "LeaseRecord", "current_lease", "read_clock"]

_Result = TypeVar("_Result")

_logger = logging.getLogger(__name__)

_HELD = 0.9  # of the lease's time; the rest allows for clocks of another pace, and for the time after a check
_RENEWED_AFTER = 1 / 3
_REPEATED_AFTER = 1 / 20  # after a failed renewal
_LONGEST_PAUSE = 1 / 4  # between two looks of a waiter
_FIRST_PAUSE = 0.2
_PATIENCE = 1 / 4  # a renewal whose connection hangs leaves time for another
_MOST_PATIENCE = 10.0
_END_SECONDS = 5.0
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class LeaseRecord(BaseModel):
    """The content of a lease's object, for people to read. It has no time in it, as no clocks are compared."""

    model_config = ConfigDict(frozen=True)

    holder: str = Field(description="The id of this holding, different for each.")
    host: str = Field(description="The holder's machine.")
    pid: int = Field(description="The holder's process there.")
    fence: int = Field(description="1, plus one for each time that the lease was taken over from a silent holder.")
    writes: int = Field(
        description="How often this holder has written the object, so that no two versions are the same."
    )


def read_clock() -> float:
    """Read a clock that is never set, in seconds. If the platform allows, it goes on while the machine sleeps."""
    return time.clock_gettime(_CLOCK)


class BucketLeases:
    """The leases in one bucket, by key. Hosts with the same bucket and prefix share them.

    Args:
        bucket: Where the leases are, as `leases/<digest of the key>.json` below the prefix. Neither an image nor a
            manifest can have such a name.
        lease_seconds: How long a holder may be silent, in seconds. Must be the same on all hosts.
        clock: Returns seconds that never go back. Tests pass another one.
    """

    def __init__(self, bucket: ImageBucket, lease_seconds: float, *, clock: Callable[[], float] = read_clock) -> None:
        self._bucket = bucket
        self._seconds = lease_seconds
        self._clock = clock

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[Lease]:
        """Hold a lease for the length of an `async with` block, waiting for it as long as it takes.

        The lease is renewed meanwhile, and released at the end, also if the block fails or is cancelled. `Lease.check`
        raises if it is no longer held. Costs one PUT and one DELETE; a PUT each third of `lease_seconds` while it is
        held; a GET each time that a waiter looks, after 0.2 seconds to a quarter of `lease_seconds`; and two PUTs the
        first time that a process holds a lease in a bucket.

        Raises:
            ConditionsIgnored: the server can't keep leases.
            BucketUnavailable: the server has not answered for `lease_seconds`.
            BucketError: the server refuses; the message says what to correct.
        """
        path = _path(key)
        patience = min(self._seconds * _PATIENCE, _MOST_PATIENCE)
        lease = Lease(ConditionalObject(self._bucket, path, patience=patience), self._seconds, self._clock)
        try:
            await lease._take()  # noqa: SLF001 - the two halves of one thing
            lease._start_renewing()  # noqa: SLF001 - as above
            await self._prove_conditions_once(path, lease)
            token = _lease.set(lease)
            try:
                yield lease
            finally:
                _lease.reset(token)
        finally:
            await _to_its_end(lease._give_back())  # noqa: SLF001 - as above

    def is_held(self, key: str) -> bool:
        """Whether an enclosing `hold` has this lease."""
        lease = _lease.get()
        return lease is not None and lease.is_at(ConditionalObject(self._bucket, _path(key), patience=0).uri)

    async def _prove_conditions_once(self, path: str, lease: Lease) -> None:
        trust = _trust_in(str(self._bucket.get_client().meta.endpoint_url), self._bucket.bucket_name)
        if not trust.earned:
            # The lease is renewed meanwhile, so there is no hurry.
            place = ConditionalObject(self._bucket, path, patience=_MOST_PATIENCE)
            await place.prove_conditions(lease._content())  # noqa: SLF001 - as above
            trust.earned = True


class Lease:
    """The right to make one image, for as long as the lease is held. From `BucketLeases.hold`."""

    def __init__(self, place: ConditionalObject, seconds: float, clock: Callable[[], float]) -> None:
        self._place = place
        self._seconds = seconds
        self._clock = clock
        self._record = LeaseRecord(holder=uuid4().hex, host=socket.gethostname(), pid=os.getpid(), fence=1, writes=0)
        self._etag: str | None = None
        self._until = -float("inf")
        self._lost: str | None = None
        self._given_back = anyio.Event()
        self._renewing: asyncio.Task[None] | None = None

    @property
    def fence(self) -> int:
        """The number of this holder in a row of takeovers from silent holders. 1: the lease was free."""
        return self._record.fence

    def is_at(self, uri: str) -> bool:
        """Whether it is the lease with this address, and not released yet."""
        return self._place.uri == uri and not self._given_back.is_set()

    def check(self) -> None:
        """Check that the lease is held, right before an action that only the holder may take. Sends no request.

        Raises:
            LeaseLost: the lease is lost, or may be. It stays lost.
        """
        if self._lost is None and self._clock() >= self._until:
            self._lost = f"it was not renewed within {self._seconds:g} s"
        if self._lost is not None:
            raise LeaseLost(
                f"Not sent: the lease {self._place.uri} is lost, as {self._lost}. Another machine may be making the "
                "image. Run again: what is published by then costs nothing."
            )

    async def _take(self) -> None:
        seen: Version | None = None
        seen_since = answered_at = self._clock()
        pause = _FIRST_PAUSE
        while True:
            try:
                may_write = seen is None or self._is_ours(seen) or self._clock() - seen_since >= self._seconds
                # Run to the end: a write abandoned on its way would leave a lease that is never released.
                if may_write and await _to_its_end(self._write(over=_etag(seen), fence=self._fence_over(seen))):
                    self._log_takeover()
                    return
                latest = await self._place.read()
                answered_at = self._clock()  # later than the look itself: what is seen may be older, never younger
                if _etag(latest) != _etag(seen):
                    seen, seen_since = latest, answered_at
                    if seen is None or self._is_ours(seen):
                        continue
                    self._log_wait(seen)
            except BucketUnavailable:
                if self._clock() - answered_at >= self._seconds:
                    raise
            await anyio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - spreads looks, guards nothing
            pause = min(pause * 1.5, max(_FIRST_PAUSE, self._seconds * _LONGEST_PAUSE))

    def _fence_over(self, seen: Version | None) -> int:
        if seen is None:
            return 1
        fence = self._read(seen).fence
        return fence if self._is_ours(seen) else fence + 1

    async def _write(self, *, over: str | None, fence: int) -> bool:
        self._record = self._record.model_copy(update={"fence": fence, "writes": self._record.writes + 1})
        began_at = self._clock()
        etag = await self._place.write(self._content(), over=over)
        if etag is None:
            return False
        self._etag, self._until = etag, began_at + self._seconds * _HELD
        return True

    def _content(self) -> bytes:
        return self._record.model_dump_json().encode()

    def _start_renewing(self) -> None:
        self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        pause = _RENEWED_AFTER
        while not await self._is_given_back_within(self._seconds * pause):
            try:
                self.check()
                pause = _RENEWED_AFTER if await self._renew_once() else _REPEATED_AFTER
            except LeaseLost:
                _logger.warning("The lease %s is lost, as %s", self._place.uri, self._lost)
                return
            except BucketError as error:
                _logger.warning("A lease could not be renewed: %s", error)
                pause = _REPEATED_AFTER

    async def _renew_once(self) -> bool:
        if await self._write(over=self._etag, fence=self.fence):
            return True
        latest = await self._place.read()
        if latest is None or not self._is_ours(latest):
            self._lost = "its object was removed" if latest is None else f"{self._name_holder(latest)} took it over"
            self.check()
        else:  # written by a renewal of ours whose answer was lost, so it is not known when: once more
            self._etag = latest.etag
        return False

    async def _is_given_back_within(self, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            await self._given_back.wait()
        return self._given_back.is_set()

    async def _give_back(self) -> None:
        self._given_back.set()
        with anyio.move_on_after(_END_SECONDS):
            if self._renewing is not None:
                await asyncio.wait([self._renewing])
            await self._remove()
        if self._renewing is not None:
            self._renewing.cancel()

    async def _remove(self) -> None:
        # Not after its time is over: a server that ignores the condition would remove the next holder's lease.
        left = self._until - self._clock()
        if self._etag is None or self._lost is not None or left <= 0:
            return
        try:
            with anyio.move_on_after(left):
                await self._place.remove(self._etag)
        except BucketError as error:
            _logger.warning("A lease stays behind for %g s, as it could not be removed: %s", self._seconds, error)

    def _is_ours(self, version: Version) -> bool:
        return self._read(version).holder == self._record.holder

    def _read(self, version: Version) -> LeaseRecord:
        try:
            return LeaseRecord.model_validate_json(version.content)
        except ValidationError as error:
            raise KeyOccupied(f"{self._place.uri} exists but is not a lease: remove it.") from error

    def _name_holder(self, version: Version) -> str:
        record = self._read(version)
        return f"process {record.pid} on {record.host}"

    def _log_wait(self, version: Version) -> None:
        _logger.info("Waiting for %s, which holds %s", self._name_holder(version), self._place.uri)

    def _log_takeover(self) -> None:
        if self.fence > 1:
            _logger.warning("Took over %s from a silent holder, as holder number %d", self._place.uri, self.fence)


_lease: ContextVar[Lease | None] = ContextVar("lease", default=None)


def current_lease() -> Lease | None:
    """The lease of the enclosing `BucketLeases.hold`, if any."""
    return _lease.get()


@dataclass
class _Trust:
    """Whether a bucket has been seen to honour conditional requests."""

    earned: bool = False


@functools.cache
def _trust_in(server: str, bucket: str) -> _Trust:  # noqa: ARG001 - the cache's key
    return _Trust()


def _path(key: str) -> str:
    return f"leases/{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"


def _etag(version: Version | None) -> str | None:
    return None if version is None else version.etag


async def _to_its_end(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run work to its end, even if its caller is cancelled meanwhile; the cancellation continues after it."""
    task = asyncio.ensure_future(work)
    with anyio.CancelScope(shield=True):
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:  # a task's own `cancel` passes the shields of anyio
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # retrieved, so that asyncio does not log it as never retrieved
            raise
    return task.result()
