"""The newest records of a batch, for the gallery, in bounded memory."""

from __future__ import annotations

import heapq
from collections import deque
from datetime import datetime
from itertools import chain, islice

from flux_prefect.manifest.records import ItemRecord

__all__ = ["PAGE", "RecentRecords"]

PAGE = 48
"""The number of images on a page."""


class RecentRecords:
    """The newest of all records added, at most a page of each kind.

    Rows that this run published or that failed come first, the last to end at the top. Unchanged rows follow, by the
    time of their publication; then rows that a cap left out, which have nothing to show.
    """

    def __init__(self, most: int = PAGE) -> None:
        self._most = most
        self._ended: deque[ItemRecord] = deque(maxlen=most)
        self._there: list[tuple[datetime, int, ItemRecord]] = []
        self._left_out: deque[ItemRecord] = deque(maxlen=most)

    def add(self, record: ItemRecord) -> None:
        """Add a record. Once there is a page of its kind, the oldest one is dropped."""
        if record.status == "unchanged":
            entry = (max(image.published_at for image in record.images), record.row, record)
            (heapq.heappush if len(self._there) < self._most else heapq.heappushpop)(self._there, entry)
        elif record.status == "skipped_budget":
            self._left_out.append(record)
        else:
            self._ended.append(record)

    def records(self) -> list[ItemRecord]:
        """Return at most a page of records, newest first."""
        there = (record for _, _, record in sorted(self._there, reverse=True))
        return list(islice(chain(reversed(self._ended), there, reversed(self._left_out)), self._most))
