"""Index of the published images that a plan found in the bucket."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from pydantic import TypeAdapter

from flux_prefect.bucket.published_image import PublishedImage

__all__ = ["PublishedIndex"]

_IMAGES = TypeAdapter(tuple[PublishedImage, ...])


class PublishedIndex:
    """Published images of complete requests, by fingerprint.

    Stored in an unnamed temporary database that disappears with this object or its process: about 1 kB of disk a
    request and 2 MB of memory for any number of requests. For use in one thread.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE finds (fingerprint TEXT PRIMARY KEY, images BLOB) WITHOUT ROWID")

    def __len__(self) -> int:
        (number,) = self._database.execute("SELECT count(*) FROM finds").fetchone()
        return int(number)

    def add(self, fingerprint: str, images: Sequence[PublishedImage]) -> None:
        """Add a request's images."""
        content = _IMAGES.dump_json(tuple(images))
        self._database.execute("INSERT OR REPLACE INTO finds VALUES (?, ?)", (fingerprint, content))

    def get(self, fingerprint: str) -> tuple[PublishedImage, ...] | None:
        """Return a request's images, or None if they were not all found."""
        row = self._database.execute("SELECT images FROM finds WHERE fingerprint = ?", (fingerprint,)).fetchone()
        return None if row is None else _IMAGES.validate_json(row[0])

    def close(self) -> None:
        """Delete the index."""
        self._database.close()
