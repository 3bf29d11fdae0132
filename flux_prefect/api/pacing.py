"""The in-flight limit that learns: how many paid calls one process may have open at once.

A service that refuses calls for being too many says so by 429, or by 503 with a time to come back. A `Pacer`
then halves its limit, stops everybody until that time, and grows the limit again by one after each full window
of calls that the service took.

One pacer serves all threads and event loops of a process.
"""

from __future__ import annotations

import asyncio
import bisect
import concurrent.futures
import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from flux_prefect.api.models import normalize_endpoint

logger = logging.getLogger(__name__)


class NoSlot(TimeoutError):
    """The service refused calls for longer than a call had patience to wait."""


@dataclass(eq=False)
class Turn:
    """One call's place in the line of a pacer, kept over all its refusals. Made by `Pacer.turn`.

    Attributes:
        patience: seconds to go on waiting while the service refuses.
        ticket: its place: who asked first goes first, also after a refusal.
        asked_at: when it was made, on the clock of `time.monotonic`.
        refused_at: when the service first refused this very call.
    """

    patience: float
    ticket: int
    asked_at: float
    refused_at: float | None = None
    holds_slot: bool = field(default=False, init=False)
    round: int = field(default=0, init=False)
    bell: concurrent.futures.Future[None] | None = field(default=None, init=False, repr=False)

    def ring(self) -> None:
        """Wake whoever waits with this turn, on its own event loop."""
        bell, self.bell = self.bell, None
        if bell is not None and bell.set_running_or_notify_cancel():
            bell.set_result(None)


class Pacer:
    """At most `limit` calls at once, in the order in which they asked.

    Example:
        ```python
        turn = pacer.turn(patience=600)
        while True:
            async with pacer.slot(turn):
                answer = await send()
                if answer.status_code != 429:
                    pacer.accepted(turn)
                    break
                pacer.refused(turn, pause=5)
        ```
    """

    def __init__(self, max_in_flight: int) -> None:
        _check_limit(max_in_flight)
        self._lock = threading.Lock()  # held for microseconds, never over an await
        self._max_in_flight = max_in_flight
        self._limit = max_in_flight
        self._in_flight = 0
        self._line: list[Turn] = []
        self._tickets = itertools.count()
        self._round = 0  # one more with each halving
        self._accepted = 0  # in this round, towards a full window
        self._paused_until = -math.inf
        self._refusing_since: float | None = None

    def __repr__(self) -> str:
        return f"Pacer(limit={self.limit}, max_in_flight={self.max_in_flight}, in_flight={self.in_flight})"

    @property
    def limit(self) -> int:
        """How many calls may be open at once now, 1 to `max_in_flight`."""
        return self._limit

    @property
    def in_flight(self) -> int:
        """How many slots are held now. For a moment after a halving it may be over `limit`."""
        return self._in_flight

    @property
    def max_in_flight(self) -> int:
        """The limit's upper bound."""
        return self._max_in_flight

    @max_in_flight.setter
    def max_in_flight(self, most: int) -> None:
        _check_limit(most)
        with self._lock:
            unhurt = self._limit == self._max_in_flight
            self._max_in_flight = most
            self._limit = most if unhurt else min(self._limit, most)
            self._admit()

    def resume(self, limit: int) -> None:
        """Begin with a limit that an earlier process has learnt; it grows again from there as calls are accepted."""
        _check_limit(limit)
        with self._lock:
            self._limit = min(limit, self._max_in_flight)

    def turn(self, patience: float) -> Turn:
        """A place at the end of the line.

        Args:
            patience: seconds to go on waiting while the service refuses. Waiting for other calls of this
                process, which the service does take, is not counted.
        """
        with self._lock:
            return Turn(patience=patience, ticket=next(self._tickets), asked_at=time.monotonic())

    @asynccontextmanager
    async def slot(self, turn: Turn) -> AsyncIterator[None]:
        """Hold one of `limit` slots, waiting until one is free and any pause is over.

        A cancelled waiter gives back what it was given. One turn may hold one slot at a time.

        Raises:
            NoSlot: a `TimeoutError`. The service has refused this call (or, where this call was never sent,
                all calls since this one asked) for `turn.patience` seconds, or the pause that it asked for
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
        same burst. Their pause still counts where it is the longer one.

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
            new_burst = turn.round == self._round
            if new_burst:
                self._round += 1
                self._accepted = 0
                self._limit = max(1, self._limit // 2)
            self._paused_until = max(self._paused_until, now + pause)
            for waiting in self._line:  # each has to reckon anew how long to wait
                waiting.ring()
            limit, wait = self._limit, self._paused_until - now
        if new_burst:
            logger.warning("the service asked to slow down; at most %d calls at once, the next in %.1f s", limit, wait)

    def accepted(self, turn: Turn) -> None:
        """The service took a call: after a full window of them (`limit`), the limit grows by one."""
        with self._lock:
            if turn.round != self._round:
                return  # sent before the last halving: it says nothing of the limit since
            self._refusing_since = None
            if self._limit >= self._max_in_flight:
                return
            self._accepted += 1
            if self._accepted >= self._limit:
                self._accepted = 0
                self._limit += 1
                self._admit()

    async def _enter(self, turn: Turn) -> None:
        with self._lock:
            bisect.insort(self._line, turn, key=lambda other: other.ticket)
        try:
            while True:
                with self._lock:
                    self._admit()
                    if turn.holds_slot:
                        return
                    timeout = self._time_to_look_again(turn)
                    bell = turn.bell = concurrent.futures.Future()
                await asyncio.wait([asyncio.wrap_future(bell)], timeout=timeout)
        except BaseException:
            self._withdraw(turn)
            raise

    def _time_to_look_again(self, turn: Turn) -> float | None:
        now = time.monotonic()
        end = math.inf
        if turn.refused_at is not None:
            end = turn.refused_at + turn.patience
        elif self._refusing_since is not None:
            end = max(turn.asked_at, self._refusing_since) + turn.patience
        if max(now, self._paused_until) >= end:
            raise NoSlot("the service refuses calls for longer than this call can wait")
        if now < self._paused_until:
            end = self._paused_until
        return None if end == math.inf else end - now

    def _admit(self) -> None:
        if time.monotonic() < self._paused_until:
            return
        while self._line and self._in_flight < self._limit:
            turn = self._line.pop(0)
            turn.holds_slot = True
            turn.round = self._round
            self._in_flight += 1
            turn.ring()

    def _leave(self, turn: Turn) -> None:
        with self._lock:
            self._take_back(turn)

    def _withdraw(self, turn: Turn) -> None:
        with self._lock:
            if turn.holds_slot:  # given at the very moment in which its waiter was cancelled
                self._take_back(turn)
            else:
                turn.bell = None
                self._line.remove(turn)

    def _take_back(self, turn: Turn) -> None:
        turn.holds_slot = False
        self._in_flight -= 1
        self._admit()


_SHARING = threading.Lock()  # a cache alone may build two pacers where two threads miss it at once


def shared_pacer(endpoint: str, max_in_flight: int) -> Pacer:
    """The one pacer of this process for an endpoint, whichever way its URL is written.

    The service limits an account, so all clients of a process share what was learnt. The last caller's
    `max_in_flight` holds for all of them: a worker that lives for weeks follows a changed setting without
    a restart. Where it is lowered, calls in flight are let finish; where it is raised, a limit that
    was halved still grows one by one.
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
