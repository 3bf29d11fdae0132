"""Local files: atomic writes, and messages for disk errors."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["explain_os_error", "open_part", "part_path", "remove_abandoned"]

_TOO_MANY_FILES = {
    errno.EMFILE: "this process has as many files open as it may: raise its limit (ulimit -n), or lower max_in_flight",
    errno.ENFILE: "the whole machine has as many files open as it may: close some, or lower max_in_flight",
}

_LOCKED_PART = re.compile(r"\.[0-9a-f]{32}\.part$")
_LONGEST_WRITE = 24 * 3600.0  # seconds, where no lock shows whether a file is still written


def part_path(path: Path) -> Path:
    """The temporary path to which a file is written before it is renamed. Unique to each write."""
    return path.with_name(f"{path.name}.{uuid4().hex}.part")


def open_part(part: Path, *, buffering: int = -1) -> BinaryIO:
    """Create a temporary file and lock it until it is closed: `remove_abandoned` in any process leaves it alone.

    Rename it before it is closed. The lock is the kernel's, so it also holds between containers, whose process ids
    mean nothing to each other, and it ends with its process.

    Args:
        part: from `part_path`.
        buffering: as for `open`.
    """
    while True:
        file = part.open("wb", buffering=buffering)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if part.exists():  # it was not removed before it was locked
            return file
        file.close()


def remove_abandoned(part: Path) -> None:
    """Remove a temporary file whose writer has died. Ignores a file that is gone, or that can't be removed.

    A file without a lock counts as abandoned. Where locks prove nothing, as the file system has none or an older
    release wrote the file, it does a day after its last write.
    """
    with suppress(OSError), part.open("rb+") as file:  # over a network, a lock needs a file that can be written
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            known = False
        else:
            known = _LOCKED_PART.search(part.name) is not None
        if known or time.time() - os.fstat(file.fileno()).st_mtime > _LONGEST_WRITE:
            part.unlink()


def explain_os_error(error: OSError, remedy: str) -> str:
    """Describe the reason, in brackets, and the remedy: the end of an error message.

    Args:
        error: the system's error.
        remedy: what to do. Replaced where the cause is too many open files.
    """
    return f"({error.strerror or error}): {_TOO_MANY_FILES.get(error.errno or 0, remedy)}"
