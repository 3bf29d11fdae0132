"""An adaptive in-flight limit: how many paid calls one process may have open at once.

A service refuses excess calls with 429, or with 503 and Retry-After. It does not report how many calls it would accept,
so a `Pacer` determines that by these rules:

- The limit starts at `max_in_flight`, or at the argument of `resume`. Only refusals lower it.
- A refusal pauses all calls until the time that the service requests, and halves the limit. The calls in flight at that
  moment are one burst: further refusals among them do not halve the limit again but lower it to the number of calls
  that the service still accepts, at least 1. If all but seven of fifty calls are refused, the limit is 7, not 25.
- The number of calls that the service still accepted at a refusal is stored as its ceiling, unless it is less than the
  halved limit: then few calls were open, or all were refused, and the number of calls was not the cause.
- Below the ceiling the limit grows by one with each accepted call, as the service has accepted that many before. It is
  back at the ceiling after about the duration of one call.
- At the ceiling the pacer waits for 16 full windows (a window: as many accepted calls as the limit, while the limit is
  fully used) and for 16 times the pause of the last refusal, then probes with one more call. A full window with that
  call proves that the service accepts more, and the ceiling is dropped. A refused probe doubles the 16, up to 64. So
  pauses for probes cost a sixteenth of the time at first and a sixty-fourth in the long run. At a ceiling of 7, one
  call in 450 is refused, and a service that takes 10 seconds a call is still probed every 11 minutes.
- Without a known ceiling, the limit grows by one after each window of accepted calls.

One pacer serves all threads and event loops of a process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import hashlib
import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pydantic import SecretStr

from flux_prefect.api.models import normalize_endpoint

__all__ = ["AdaptiveLimit", "Pacer", "PacingTimeout", "Turn", "shared_pacer"]

logger = logging.getLogger(__name__)

_SOONEST_PROBE, _LATEST_PROBE = 16, 64  # full windows, and pauses, before a probe: initial and highest


class PacingTimeout(TimeoutError):
    """The service refused calls for longer than a call's `max_wait`."""


@dataclass(eq=False)
class Turn:
    """One call's position in the queue of a pacer, kept over all its refusals. Created by `Pacer.turn`.

    Attributes:
        max_wait: seconds to keep waiting while the service refuses calls.
        ticket: its position. Earlier turns go first, also after a refusal.
        requested_at: time of its creation, on the clock of `time.monotonic`.
        refused_at: time of the first refusal of this call.
    """

    max_wait: float
    ticket: int
    requested_at: float
    refused_at: float | None = None
    holds_slot: bool = field(default=False, init=False)
    was_refused: bool = field(default=False, init=False)  # in its current slot
    round: int = field(default=0, init=False)
    wakeup: concurrent.futures.Future[None] | None = field(default=None, init=False, repr=False)
    wakes_at: float = field(default=-math.inf, init=False, repr=False)  # when it wakes up by itself

    def wake(self) -> None:
        """Wake the waiter of this turn, on its own event loop."""
        wakeup, self.wakeup = self.wakeup, None
        if wakeup is not None and wakeup.set_running_or_notify_cancel():
            wakeup.set_result(None)


class AdaptiveLimit:
    """The rules of this module as plain arithmetic, without a clock or a lock.

    Attributes:
        limit: calls that may be open at once now.
        maximum: the limit's upper bound.
        ceiling: calls that the service still accepted at its last refusal, or None if unknown.
    """

    def __init__(self, maximum: int) -> None:
        self.limit = self.maximum = maximum
        self.ceiling: int | None = None
        self._probe_after = _SOONEST_PROBE  # full windows, and pauses, before the next probe
        self._taken = 0  # accepted calls since the limit changed
        self._no_probe_before = -math.inf

    def reset(self, limit: int) -> None:
        """Set the limit and the ceiling to a known value."""
        self.limit = min(limit, self.maximum)
        self.ceiling = limit
        self._probe_after = _SOONEST_PROBE
        self._taken = 0

    def set_maximum(self, maximum: int) -> None:
        """Change the upper bound. A limit that no refusal has lowered changes with it."""
        untouched = self.limit == self.maximum and self.ceiling is None
        self.maximum = maximum
        self.limit = maximum if untouched else min(self.limit, maximum)

    def refuse(self, held: int, now: float, pause: float) -> None:
        """Record the first refusal of a burst.

        Args:
            held: calls in flight that are not refused.
            now: time of the refusal, in seconds on the same clock as for `accept`.
            pause: seconds for which all calls pause.
        """
        self._probe_after = min(2 * self._probe_after, _LATEST_PROBE) if self._is_probing() else _SOONEST_PROBE
        self._no_probe_before = now + self._probe_after * pause
        self._taken = 0
        self.limit = max(1, self.limit // 2)
        self._see_ceiling(held)

    def refuse_more(self, held: int) -> None:
        """Record a further refusal of the same burst, with `held` calls in flight that are not refused."""
        self.limit = max(1, min(self.limit, held))
        self._see_ceiling(held)

    def accept(self, in_flight: int, now: float) -> None:
        """Record an accepted call, with `in_flight` calls in flight including it."""
        if self.ceiling is None:
            self._taken += 1
            if self._taken >= self.limit:
                self._grow()
        elif self.limit < self.ceiling:
            self._grow()
        elif in_flight >= self.limit:  # below the limit, an accepted call proves nothing
            self._taken += 1
            if self._is_probing():
                if self._taken >= self.limit:
                    self.ceiling = None
                    self._grow()
            elif self._taken >= self._probe_after * self.limit and now >= self._no_probe_before:
                self._grow()

    def _is_probing(self) -> bool:
        return self.ceiling is not None and self.limit > self.ceiling

    def _see_ceiling(self, held: int) -> None:
        self.ceiling = held if held >= self.limit else None

    def _grow(self) -> None:
        self._taken = 0
        self.limit = min(self.limit + 1, self.maximum)


class Pacer:
    """Admits at most `limit` calls at once, in the order of their turns.

    Example:
        ```python
        pacer = Pacer(max_in_flight=8)
        turn = pacer.turn(max_wait=600)
        async with pacer.slot(turn):
            ...  # send the call
            pacer.accepted(turn)  # or, on a 429, pacer.refused(turn, pause=5)
        ```
    """

    def __init__(self, max_in_flight: int) -> None:
        _check_limit(max_in_flight)
        self._lock = threading.Lock()  # held for microseconds, never over an await
        self._adaptive = AdaptiveLimit(max_in_flight)
        self._in_flight = 0
        self._refused_in_flight = 0  # refused, and about to release their slots
        self._waiting: dict[int, Turn] = {}  # by ticket
        self._queue: list[int] = []  # a heap of their tickets; those of withdrawn turns are skipped on reading
        self._tickets = itertools.count()
        self._round = 0  # incremented with each burst of refusals
        self._paused_until = -math.inf
        self._refusing_since: float | None = None

    def __repr__(self) -> str:
        return f"Pacer(limit={self.limit}, max_in_flight={self.max_in_flight}, in_flight={self.in_flight})"

    @property
    def limit(self) -> int:
        """The number of calls that may be open at once now, 1 to `max_in_flight`."""
        return self._adaptive.limit

    @property
    def ceiling(self) -> int | None:
        """The number of calls that the service still accepted at its last refusal: the value at which `limit` settles.

        None if no refusal has shown it, or once the service has accepted more.
        """
        return self._adaptive.ceiling

    @property
    def learned_limit(self) -> int | None:
        """The number of calls that the service accepts, as learned from refusals: the ceiling, else a lowered limit.

        None if no refusal has lowered the limit.
        """
        return self.ceiling or (self.limit if self.limit < self.max_in_flight else None)

    @property
    def in_flight(self) -> int:
        """The number of slots held now. It can exceed `limit` for a moment after a halving."""
        return self._in_flight

    @property
    def max_in_flight(self) -> int:
        """The limit's upper bound."""
        return self._adaptive.maximum

    @max_in_flight.setter
    def max_in_flight(self, maximum: int) -> None:
        _check_limit(maximum)
        with self._lock:
            self._adaptive.set_maximum(maximum)
            self._admit()

    def resume(self, limit: int) -> None:
        """Start with the limit that an earlier process has learned, as the limit and as the ceiling."""
        _check_limit(limit)
        with self._lock:
            self._adaptive.reset(limit)
            self._admit()

    def turn(self, max_wait: float) -> Turn:
        """Create a turn at the end of the queue.

        Args:
            max_wait: seconds to keep waiting while the service refuses calls. Time spent waiting for other calls of
                this process, which the service accepts, does not count.
        """
        with self._lock:
            return Turn(max_wait=max_wait, ticket=next(self._tickets), requested_at=time.monotonic())

    @asynccontextmanager
    async def slot(self, turn: Turn) -> AsyncIterator[None]:
        """Hold one of `limit` slots, waiting until one is free and any pause is over.

        A cancelled waiter releases its slot. One turn may hold one slot at a time.

        Raises:
            PacingTimeout: a `TimeoutError`. The service has refused this call (or, if this call was never sent,
                all calls since its turn was created) for `turn.max_wait` seconds, or the requested pause exceeds that
                time: then at once, as waiting would not help.
        """
        await self._enter(turn)
        try:
            yield
        finally:
            self._leave(turn)

    def refused(self, turn: Turn, pause: float) -> None:
        """Record that the service refused a call: halve the limit and pause all calls.

        Calls that were in flight when the limit was halved belong to the same burst and do not halve it again. They
        lower it to the number of calls that the service still accepts, and the longest of their pauses applies.
        Costs a check of every waiting call.

        Args:
            turn: the call, while it holds its slot.
            pause: seconds until the next call may be sent.
        """
        with self._lock:
            now = time.monotonic()
            if self._refusing_since is None:
                self._refusing_since = now
            if turn.refused_at is None:
                turn.refused_at = now
            if not turn.was_refused:
                turn.was_refused = True
                self._refused_in_flight += 1
            held = self._in_flight - self._refused_in_flight
            self._paused_until = max(self._paused_until, now + pause)
            wait = self._paused_until - now
            new_burst = turn.round == self._round
            if new_burst:
                self._round += 1
                self._adaptive.refuse(held, now, wait)
            else:
                self._adaptive.refuse_more(held)
            for waiting in self._waiting.values():
                if self._wake_time(waiting, now) < waiting.wakes_at:
                    waiting.wake()
            limit = self._adaptive.limit
        if new_burst:
            logger.warning("the service asked to slow down; at most %d calls at once, the next in %.1f s", limit, wait)

    def accepted(self, turn: Turn) -> None:
        """Record that the service accepted a call, which still holds its slot. The limit may grow."""
        with self._lock:
            if turn.round != self._round:
                return  # sent before the last halving, so it proves nothing about the current limit
            self._refusing_since = None
            self._adaptive.accept(self._in_flight, time.monotonic())
            self._admit()

    async def _enter(self, turn: Turn) -> None:
        with self._lock:
            heapq.heappush(self._queue, turn.ticket)
            self._waiting[turn.ticket] = turn
        try:
            while True:
                with self._lock:
                    self._admit()
                    if turn.holds_slot:
                        return
                    timeout = self._wait_seconds(turn)
                    wakeup = turn.wakeup = concurrent.futures.Future()
                await asyncio.wait([asyncio.wrap_future(wakeup)], timeout=timeout)
        except BaseException:
            self._withdraw(turn)
            raise

    def _wait_seconds(self, turn: Turn) -> float | None:
        now = time.monotonic()
        turn.wakes_at = self._wake_time(turn, now)
        if turn.wakes_at <= now:
            raise PacingTimeout("the service has refused calls for longer than this call may wait")
        return None if turn.wakes_at == math.inf else turn.wakes_at - now

    def _wake_time(self, turn: Turn, now: float) -> float:
        """The time at which a waiting call wakes up by itself; not later than now if waiting would not help."""
        end = math.inf
        if turn.refused_at is not None:
            end = turn.refused_at + turn.max_wait
        elif self._refusing_since is not None:
            end = max(turn.requested_at, self._refusing_since) + turn.max_wait
        if self._paused_until >= end:
            return -math.inf
        return self._paused_until if now < self._paused_until else end

    def _admit(self) -> None:
        if time.monotonic() < self._paused_until:
            return
        while self._queue and self._in_flight < self._adaptive.limit:
            turn = self._waiting.pop(heapq.heappop(self._queue), None)
            if turn is None:
                continue
            turn.holds_slot = True
            turn.was_refused = False
            turn.round = self._round
            self._in_flight += 1
            turn.wake()

    def _leave(self, turn: Turn) -> None:
        with self._lock:
            self._take_back(turn)

    def _withdraw(self, turn: Turn) -> None:
        with self._lock:
            if turn.holds_slot:  # admitted at the moment of its waiter's cancellation
                self._take_back(turn)
            else:
                turn.wakeup = None
                self._waiting.pop(turn.ticket, None)

    def _take_back(self, turn: Turn) -> None:
        turn.holds_slot = False
        self._in_flight -= 1
        self._refused_in_flight -= turn.was_refused
        self._admit()


_SHARING = threading.Lock()  # a cache alone could build two pacers if two threads miss it at once


def shared_pacer(endpoint: str, api_key: SecretStr, max_in_flight: int) -> Pacer:
    """Return this process's only pacer for an account: an API key at an endpoint, however its URL is written.

    The service limits accounts, so all clients of an account share the learned limit. Of the key, only a digest is
    stored. The last caller's `max_in_flight` applies to all of them, so a long-running worker follows a changed
    setting without a restart. If it is lowered, calls in flight finish; if it is raised, a limit that was halved still
    grows by one at a time.

    Example:
        ```python
        async with AimlApiClient(api_key=key, base_url=url, pacer=shared_pacer(url, key, 16)) as client:
            await client.balance()
        ```
    """
    account = hashlib.sha256(api_key.get_secret_value().strip().encode()).digest()
    with _SHARING:
        pacer = _pacer(normalize_endpoint(endpoint), account)
        if pacer.max_in_flight != max_in_flight:
            pacer.max_in_flight = max_in_flight
    return pacer


@functools.cache
def _pacer(endpoint: str, account: bytes) -> Pacer:  # noqa: ARG001 - the cache's keys
    return Pacer(1)


def _check_limit(max_in_flight: int) -> None:
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight is {max_in_flight}: at least 1 call must be allowed at once")
