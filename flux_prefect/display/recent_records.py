"""The end of a batch that a person looks at first: its newest records, and no more of them in memory."""

from __future__ import annotations

import heapq
from collections import deque
from datetime import datetime
from itertools import chain, islice

from flux_prefect.manifest.records import ItemRecord

__all__ = ["PAGE", "RecentRecords"]

PAGE = 48
"""Images on a page."""


class RecentRecords:
    """Keeps the newest of the records that are added as they come, at most a page of each kind.

    What this run made or failed at comes first, the last end foremost. Then images that were there already, by when
    they were published; then what a cap left out, which has nothing to show.
    """

    def __init__(self, most: int = PAGE) -> None:
        self._most = most
        self._ended: deque[ItemRecord] = deque(maxlen=most)
        self._there: list[tuple[datetime, int, ItemRecord]] = []
        self._left_out: deque[ItemRecord] = deque(maxlen=most)

    def add(self, record: ItemRecord) -> None:
        """Take a record; the oldest that no longer fits is let go."""
        if record.status == "unchanged":
            entry = (max(image.published_at for image in record.images), record.row, record)
            (heapq.heappush if len(self._there) < self._most else heapq.heappushpop)(self._there, entry)
        elif record.status == "skipped_budget":
            self._left_out.append(record)
        else:
            self._ended.append(record)

    def records(self) -> list[ItemRecord]:
        """The newest first, at most a page of them."""
        there = (record for _, _, record in sorted(self._there, reverse=True))
        return list(islice(chain(reversed(self._ended), there, reversed(self._left_out)), self._most))
