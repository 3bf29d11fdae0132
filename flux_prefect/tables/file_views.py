"""Independent views of one open file, so that several readers can share a file that has no name."""

from __future__ import annotations

import io
import os
from typing import Any, BinaryIO

__all__ = ["open_view"]


class _View(io.RawIOBase):
    """`size` bytes of an open file, with a position of its own."""

    def __init__(self, file: BinaryIO, size: int, start: int) -> None:
        self._file = file
        self._size = size
        self._start = start
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        most = min(len(buffer), max(0, self._size - self._position))
        content = os.pread(self._file.fileno(), most, self._start + self._position)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def open_view(file: BinaryIO, size: int, start: int = 0) -> io.BufferedReader:
    """Open a reader of `size` bytes of an open file from `start` on, with a position of its own.

    Other readers, and bytes appended later, do not affect it. Closing the view leaves the file open; the view can be
    read for as long as the file stays open.
    """
    return io.BufferedReader(_View(file, size, start))
