"""Virtual time: a clock that runs processes, and a pool of slots for which they wait.

A process is a generator that yields `Wait`s; the clock resumes it when the wait is over. Nothing here sleeps: an hour
costs only as much as the events in it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeAlias

__all__ = ["Clock", "Process", "Resume", "Slots", "Wait"]

Resume: TypeAlias = Callable[[], None]
Wait: TypeAlias = Callable[[Resume], bool]
"""Takes the function to call when the wait is over. Returns True, and never calls it, if no wait is necessary."""
Process: TypeAlias = Generator[Wait, None, None]


class Clock:
    """Run processes in virtual time. Events due at the same time happen in the order of their scheduling.

    Attributes:
        now: seconds since the start.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Resume]] = []
        self._numbers = itertools.count()

    def run(self, process: Process) -> None:
        """Run a process, and all processes that it starts, to their ends."""
        self.start(process)
        while self._due:
            self.now, _, resume = heapq.heappop(self._due)
            resume()

    def start(self, process: Process, then: Resume | None = None) -> None:
        """Start a process beside the others; `then` is called at its end."""

        def resume_process() -> None:
            for wait in process:
                if not wait(resume_process):
                    return
            if then is not None:
                then()

        self.call_in(0.0, resume_process)

    def call_in(self, seconds: float, resume: Resume) -> None:
        """Schedule a call in `seconds`; with 0, after the current event."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), resume))

    def pause(self, seconds: float) -> Wait:
        """Wait for some seconds."""

        def wait(resume: Resume) -> bool:
            if seconds > 0:
                self.call_in(seconds, resume)
            return seconds <= 0

        return wait

    def gather(self, processes: Iterable[Process]) -> Wait:
        """Start processes now and wait until all of them have ended."""

        def wait(resume: Resume) -> bool:
            started = list(processes)
            left = len(started)

            def count() -> None:
                nonlocal left
                left -= 1
                if not left:
                    resume()

            for process in started:
                self.start(process, count)
            return not started

        return wait


class Slots:
    """A pool of slots, assigned in the order of the requests.

    Args:
        clock: the clock in which processes wait.
        number: the number of slots, or None for an unlimited pool.
    """

    def __init__(self, clock: Clock, number: int | None) -> None:
        self._clock = clock
        self._free = number
        self._waiting: deque[Resume] = deque()

    def acquire(self, resume: Resume) -> bool:
        """Wait for a free slot and take it. The method itself is the `Wait`."""
        if self._free is None:
            return True
        if self._free == 0:
            self._waiting.append(resume)
            return False
        self._free -= 1
        return True

    def release(self) -> None:
        """Release a slot to the process that has waited longest."""
        if self._waiting:
            self._clock.call_in(0.0, self._waiting.popleft())
        elif self._free is not None:
            self._free += 1
