"""The in-flight limit of one worker in virtual time, by the rules of the real pacer."""

from __future__ import annotations

import heapq
import itertools
import math

from flux_prefect.api.pacing import AdaptiveLimit  # the rules; its `Pacer` uses real time
from flux_prefect.forecast.clock import Clock, Resume, Wait

__all__ = ["SimulatedPacer"]


class SimulatedPacer:
    """A simulation of `flux_prefect.api.pacing.Pacer`: refusals, pauses and slots, without its time limit.

    Attributes:
        burst: the number of bursts of refusals so far.
    """

    def __init__(self, clock: Clock, max_in_flight: int) -> None:
        self.burst = 0
        self._clock = clock
        self._adaptive = AdaptiveLimit(max_in_flight)
        self._tickets = itertools.count()
        self._queue: list[tuple[int, Resume]] = []
        self._in_flight = 0
        self._refused_in_flight = 0
        self._paused_until = -math.inf

    def draw_ticket(self) -> int:
        """Return a call's number in the queue, which it keeps when it is refused."""
        return next(self._tickets)

    def acquire(self, ticket: int) -> Wait:
        """Wait for a slot for the call with this ticket."""

        def wait(resume: Resume) -> bool:
            heapq.heappush(self._queue, (ticket, resume))
            self._admit()
            return False

        return wait

    def accept(self, burst: int) -> None:
        """Record that the service accepted a call sent in that burst. The call keeps its slot."""
        if burst == self.burst:
            self._adaptive.accept(self._in_flight, self._clock.now)
            self._admit()

    def refuse(self, burst: int, pause: float) -> None:
        """Record that the service refused a call sent in that burst: its slot is free, and all calls pause."""
        self._refused_in_flight += 1
        held, now = self._in_flight - self._refused_in_flight, self._clock.now
        self._paused_until = max(self._paused_until, now + pause)
        if burst == self.burst:
            self.burst += 1
            self._adaptive.refuse(held, now, self._paused_until - now)
        else:
            self._adaptive.refuse_more(held)
        self._clock.call_in(self._paused_until - now, self._admit)
        self._refused_in_flight -= 1
        self.release()

    def release(self) -> None:
        """Release a slot."""
        self._in_flight -= 1
        self._admit()

    def _admit(self) -> None:
        if self._clock.now < self._paused_until:
            return
        while self._queue and self._in_flight < self._adaptive.limit:
            self._in_flight += 1
            self._clock.call_in(0.0, heapq.heappop(self._queue)[1])
