"""The in-flight limit that learns: how many paid calls one process may have open at once.

A service that refuses calls for being too many says so by 429, or by 503 with a time to come back. Nobody tells
how many it would take, so a `Pacer` finds out by these rules:

- It starts with all of `max_in_flight`, or where `resume` says. Only refusals make it slower.
- A refusal stops everybody until the time that it names, and halves the limit. The calls that were in flight then
  are one burst: those of them that are refused as well do not halve the limit again, they lower it to what the
  service still holds, never under 1. Fifty calls of which all but seven are refused leave a limit of 7, not of 25.
- What the service held when it refused is its ceiling, and is remembered. No ceiling is shown where it held less
  than the halved limit: then there were few calls, or it takes none at all, and the reason is another one.
- Below the ceiling the limit grows by one with each accepted call: that much was held before, so it is back at the
  ceiling after about one call's time.
- At the ceiling it waits for 16 full windows (a window: as many accepted calls as the limit, while the limit is in
  full use) and for 16 times the pause of the last refusal, then probes with one call more. A full window with it
  proves that the service has grown, and the ceiling is forgotten. A refused probe doubles the 16, up to 64: what
  looking for more costs in pauses is a sixteenth of the time at first and a sixty-fourth in the end, at a ceiling of
  7 one call in 450 is refused, and a service that takes 10 seconds a call is still asked again every 11 minutes.
- Where no ceiling is known, the limit grows by one after each window of accepted calls.

One pacer serves all threads and event loops of a process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from flux_prefect.api.models import normalize_endpoint

__all__ = ["AdaptiveLimit", "Pacer", "PacingTimeout", "Turn", "shared_pacer"]

logger = logging.getLogger(__name__)

_SOONEST_PROBE, _LATEST_PROBE = 16, 64  # full windows, and pauses, before a probe: at first, after refused ones


class PacingTimeout(TimeoutError):
    """The service refused calls for longer than a call had max_wait to wait."""


@dataclass(eq=False)
class Turn:
    """One call's place in the line of a pacer, kept over all its refusals. Made by `Pacer.turn`.

    Attributes:
        max_wait: seconds to go on waiting while the service refuses.
        ticket: its place: who asked first goes first, also after a refusal.
        requested_at: when it was made, on the clock of `time.monotonic`.
        refused_at: when the service first refused this very call.
    """

    max_wait: float
    ticket: int
    requested_at: float
    refused_at: float | None = None
    holds_slot: bool = field(default=False, init=False)
    was_refused: bool = field(default=False, init=False)  # in the slot that it holds
    round: int = field(default=0, init=False)
    wakeup: concurrent.futures.Future[None] | None = field(default=None, init=False, repr=False)
    wakes_at: float = field(default=-math.inf, init=False, repr=False)  # when it wakes though nobody rings

    def wake(self) -> None:
        """Wake whoever waits with this turn, on its own event loop."""
        wakeup, self.wakeup = self.wakeup, None
        if wakeup is not None and wakeup.set_running_or_notify_cancel():
            wakeup.set_result(None)


class AdaptiveLimit:
    """The rules of the module's docstring as plain arithmetic, with no clock and no lock of its own.

    Attributes:
        limit: calls that may be open at once now.
        maximum: its upper bound.
        ceiling: what the service held when it last refused, None where that is not known.
    """

    def __init__(self, maximum: int) -> None:
        self.limit = self.maximum = maximum
        self.ceiling: int | None = None
        self._probe_after = _SOONEST_PROBE  # full windows, and pauses, before the next probe
        self._taken = 0  # accepted calls since the limit changed
        self._no_probe_before = -math.inf

    def reset(self, limit: int) -> None:
        """Take a limit for what the service holds."""
        self.limit = min(limit, self.maximum)
        self.ceiling = limit
        self._probe_after = _SOONEST_PROBE
        self._taken = 0

    def set_maximum(self, maximum: int) -> None:
        """Change the upper bound. A limit that no refusal has touched goes with it."""
        untouched = self.limit == self.maximum and self.ceiling is None
        self.maximum = maximum
        self.limit = maximum if untouched else min(self.limit, maximum)

    def refuse(self, held: int, now: float, pause: float) -> None:
        """The first refusal of a burst.

        Args:
            held: calls in flight that are not refused.
            now: when it came, in seconds on the clock that `accept` reads too.
            pause: seconds for which everybody stops.
        """
        self._probe_after = min(2 * self._probe_after, _LATEST_PROBE) if self._is_probing() else _SOONEST_PROBE
        self._no_probe_before = now + self._probe_after * pause
        self._taken = 0
        self.limit = max(1, self.limit // 2)
        self._see_ceiling(held)

    def refuse_more(self, held: int) -> None:
        """A further refusal of the same burst, with so many calls still in flight and not refused."""
        self.limit = max(1, min(self.limit, held))
        self._see_ceiling(held)

    def accept(self, in_flight: int, now: float) -> None:
        """A call was taken; with it, so many are in flight."""
        if self.ceiling is None:
            self._taken += 1
            if self._taken >= self.limit:
                self._grow()
        elif self.limit < self.ceiling:
            self._grow()
        elif in_flight >= self.limit:  # calls that leave room prove nothing of what is beyond
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
    """At most `limit` calls at once, in the order in which they asked.

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
        self._refused_in_flight = 0  # refused, and about to give their slots back
        self._waiting: dict[int, Turn] = {}  # by ticket
        self._queue: list[int] = []  # a heap of their tickets; those of withdrawn turns are passed over when it is read
        self._tickets = itertools.count()
        self._round = 0  # one more with each burst of refusals
        self._paused_until = -math.inf
        self._refusing_since: float | None = None

    def __repr__(self) -> str:
        return f"Pacer(limit={self.limit}, max_in_flight={self.max_in_flight}, in_flight={self.in_flight})"

    @property
    def limit(self) -> int:
        """How many calls may be open at once now, 1 to `max_in_flight`."""
        return self._adaptive.limit

    @property
    def ceiling(self) -> int | None:
        """How many calls the service held when it last refused one; what `limit` settles at.

        None where no refusal has shown it, and once the service has proved to take more.
        """
        return self._adaptive.ceiling

    @property
    def learned_limit(self) -> int | None:
        """How many calls the service takes, as far as its refusals have shown: the ceiling, else a lowered limit.

        None where no refusal has lowered the limit: that one was only asked for.
        """
        return self.ceiling or (self.limit if self.limit < self.max_in_flight else None)

    @property
    def in_flight(self) -> int:
        """How many slots are held now. For a moment after a halving it may be over `limit`."""
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
        """Begin with what an earlier process has learnt, as the limit and as the ceiling."""
        _check_limit(limit)
        with self._lock:
            self._adaptive.reset(limit)
            self._admit()

    def turn(self, max_wait: float) -> Turn:
        """A place at the end of the line.

        Args:
            max_wait: seconds to go on waiting while the service refuses. Waiting for other calls of this
                process, which the service does take, is not counted.
        """
        with self._lock:
            return Turn(max_wait=max_wait, ticket=next(self._tickets), requested_at=time.monotonic())

    @asynccontextmanager
    async def slot(self, turn: Turn) -> AsyncIterator[None]:
        """Hold one of `limit` slots, waiting until one is free and any pause is over.

        A cancelled waiter gives back what it was given. One turn may hold one slot at a time.

        Raises:
            PacingTimeout: a `TimeoutError`. The service has refused this call (or, where this call was never sent,
                all calls since this one asked) for `turn.max_wait` seconds, or the pause that it asked for
                lasts longer than that: then at once, as no waiting helps.
        """
        await self._enter(turn)
        try:
            yield
        finally:
            self._leave(turn)

    def refused(self, turn: Turn, pause: float) -> None:
        """The service refused a call for being one too many: halve the limit and pause everybody.

        Calls that were in flight when the limit was halved do not halve it again: they belong to the
        same burst. They lower it to what the service still holds, and their pause counts where it is the longer one.
        Costs a look at every waiting call.

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
        """The service took a call, which still holds its slot: the limit may grow."""
        with self._lock:
            if turn.round != self._round:
                return  # sent before the last halving: it says nothing of the limit since
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
            raise PacingTimeout("the service refuses calls for longer than this call can wait")
        return None if turn.wakes_at == math.inf else turn.wakes_at - now

    def _wake_time(self, turn: Turn, now: float) -> float:
        """When a waiting call has to wake by itself. Not later than now where no waiting helps."""
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
            if turn.holds_slot:  # given at the very moment in which its waiter was cancelled
                self._take_back(turn)
            else:
                turn.wakeup = None
                self._waiting.pop(turn.ticket, None)

    def _take_back(self, turn: Turn) -> None:
        turn.holds_slot = False
        self._in_flight -= 1
        self._refused_in_flight -= turn.was_refused
        self._admit()


_SHARING = threading.Lock()  # a cache alone may build two pacers where two threads miss it at once


def shared_pacer(endpoint: str, max_in_flight: int) -> Pacer:
    """The one pacer of this process for an endpoint, whichever way its URL is written.

    The service limits an account, so all clients of a process share what was learnt. The last caller's
    `max_in_flight` holds for all of them: a worker that lives for weeks follows a changed setting without
    a restart. Where it is lowered, calls in flight are let finish; where it is raised, a limit that
    was halved still grows one by one.

    Example:
        ```python
        async with AimlApiClient(api_key=key, base_url=url, pacer=shared_pacer(url, 16)) as client:
            await client.balance()
        ```
    """
    with _SHARING:
        pacer = _pacer(normalize_endpoint(endpoint))
        if pacer.max_in_flight != max_in_flight:
            pacer.max_in_flight = max_in_flight
    return pacer


@functools.cache
def _pacer(endpoint: str) -> Pacer:  # noqa: ARG001 - the cache's key
    return Pacer(1)


def _check_limit(max_in_flight: int) -> None:
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight is {max_in_flight}: at least 1 call must be allowed at once")
