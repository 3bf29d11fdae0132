"""The limits of calls: at once, and in a minute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InFlight", "RateWindow"]


class RateWindow:
    """Counts calls over the last sixty seconds."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def admit(self, limit: int | None) -> bool:
        """Count one call, unless `limit` are in the window already. None: no limit."""
        now = time.monotonic()
        while self._times and self._times[0] <= now - 60:
            self._times.popleft()
        if limit is not None and len(self._times) >= limit:
            return False
        self._times.append(now)
        return True

    def clear(self) -> None:
        """Forget the calls."""
        self._times.clear()


class InFlight:
    """Counts generations that are being worked on."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def full(self, limit: int | None) -> bool:
        """Whether one more would be over `limit`. None: no limit."""
        return limit is not None and self.now >= limit

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place for the length of a `with` block."""
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            yield
        finally:
            self.now -= 1

    def clear(self) -> None:
        """Forget the peak."""
        self.peak = self.now
