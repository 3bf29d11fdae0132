"""Stop paying where row after row fails for a reason that has nothing to do with the row."""

from __future__ import annotations

from flux_prefect.errors import (
    Billed,
    DownloadInterrupted,
    DownloadRefused,
    EmptyGeneration,
    FluxError,
    InvalidResponse,
    NotAnImage,
    UnexpectedSize,
)

__all__ = ["CircuitBreaker"]

_UNREADABLE_IN_A_ROW = 2
"""Paid answers that can't be read, one after the other, after which the service is taken to answer so to everybody."""

_UNFETCHED_IN_A_ROW = 4
"""Paid images that can't be fetched, one after the other, after which the way to their host is taken to be closed."""


class CircuitBreaker:
    """Counts failures in a row that a proxy, a host or a new form of answers would cause for every row.

    A fatal error (a wrong key, an empty account) opens it at once. Rows that fail for reasons of their own change
    nothing; an image that is published closes the count.

    Attributes:
        reason: Why nothing more may be paid for; None while it is closed.
    """

    def __init__(self) -> None:
        self.reason: FluxError | None = None
        self._unreadable = 0
        self._unfetched = 0

    def record(self, error: FluxError | None) -> None:
        """Count how a row ended.

        Args:
            error: The row's error; None where its images are published.
        """
        if error is None:
            self._unreadable = self._unfetched = 0
        elif isinstance(error, (InvalidResponse, EmptyGeneration)) and error.billed is not Billed.NO:
            self._unreadable += 1
        elif isinstance(error, (DownloadRefused, DownloadInterrupted, NotAnImage, UnexpectedSize)):
            self._unfetched += 1
        tripped = self._unreadable >= _UNREADABLE_IN_A_ROW or self._unfetched >= _UNFETCHED_IN_A_ROW
        if error is not None and self.reason is None and (error.fatal or tripped):
            self.reason = error
