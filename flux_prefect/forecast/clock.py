"""Time that passes at once, and places to wait for in it.

A process is a generator. What it yields is a `Wait`; the clock goes on with it when the wait is over. Nothing here
sleeps: an hour costs as much as the number of things that happen in it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeAlias

__all__ = ["Clock", "Places", "Process", "Resume", "Wait"]

Resume: TypeAlias = Callable[[], None]
Wait: TypeAlias = Callable[[Resume], bool]
"""Given what to call when the wait is over. It returns True, and never calls it, where there is nothing to wait for."""
Process: TypeAlias = Generator[Wait, None, None]


class Clock:
    """Processes in virtual time. What is due at the same moment comes in the order in which it was asked for.

    Attributes:
        now: seconds since the beginning.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Resume]] = []
        self._numbers = itertools.count()

    def run(self, process: Process) -> None:
        """Carry a process, and all that it begins, to the end."""
        self.begin(process)
        while self._due:
            self.now, _, resume = heapq.heappop(self._due)
            resume()

    def begin(self, process: Process, then: Resume | None = None) -> None:
        """Have a process run beside the others; `then` is called at its end."""

        def go_on() -> None:
            for wait in process:
                if not wait(go_on):
                    return
            if then is not None:
                then()

        self.call_in(0.0, go_on)

    def call_in(self, seconds: float, resume: Resume) -> None:
        """Call it in some time; after 0 seconds, once whatever happens now has happened."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), resume))

    def pause(self, seconds: float) -> Wait:
        """Some time."""

        def wait(resume: Resume) -> bool:
            if seconds > 0:
                self.call_in(seconds, resume)
            return seconds <= 0

        return wait

    def together(self, processes: Iterable[Process]) -> Wait:
        """The ends of all of them, which begin now."""

        def wait(resume: Resume) -> bool:
            begun = list(processes)
            left = len(begun)

            def count() -> None:
                nonlocal left
                left -= 1
                if not left:
                    resume()

            for process in begun:
                self.begin(process, count)
            return not begun

        return wait


class Places:
    """A number of places, taken in the order in which they were asked for.

    Args:
        clock: the time that they are waited for in.
        number: how many there are. None: always one more.
    """

    def __init__(self, clock: Clock, number: int | None) -> None:
        self._clock = clock
        self._free = number
        self._waiting: deque[Resume] = deque()

    def enter(self, resume: Resume) -> bool:
        """A `Wait` for a free place, which is taken with that."""
        if self._free is None:
            return True
        if self._free == 0:
            self._waiting.append(resume)
            return False
        self._free -= 1
        return True

    def leave(self) -> None:
        """Give a place back; whoever has waited longest has it from now on."""
        if self._waiting:
            self._clock.call_in(0.0, self._waiting.popleft())
        elif self._free is not None:
            self._free += 1
