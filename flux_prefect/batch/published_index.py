"""What a plan found in the bucket, kept until the row's turn comes."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from pydantic import TypeAdapter

from flux_prefect.bucket.published_image import PublishedImage

__all__ = ["PublishedIndex"]

_IMAGES = TypeAdapter(tuple[PublishedImage, ...])


class PublishedIndex:
    """The images of requests that are whole in the bucket, by fingerprint.

    On the disk, in a database without a name that is gone with this object or its process: about 1 kB a request there,
    2 MB of memory for any number. For one thread.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE finds (fingerprint TEXT PRIMARY KEY, images BLOB) WITHOUT ROWID")

    def __len__(self) -> int:
        (number,) = self._database.execute("SELECT count(*) FROM finds").fetchone()
        return int(number)

    def add(self, fingerprint: str, images: Sequence[PublishedImage]) -> None:
        """Keep a request's images."""
        content = _IMAGES.dump_json(tuple(images))
        self._database.execute("INSERT OR REPLACE INTO finds VALUES (?, ?)", (fingerprint, content))

    def get(self, fingerprint: str) -> tuple[PublishedImage, ...] | None:
        """A request's images, None where they were not all there."""
        row = self._database.execute("SELECT images FROM finds WHERE fingerprint = ?", (fingerprint,)).fetchone()
        return None if row is None else _IMAGES.validate_json(row[0])

    def close(self) -> None:
        """Remove it all."""
        self._database.close()
