"""Files that are whole or not there, and what to do about a failure of the disk."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from uuid import uuid4

__all__ = ["explain_os_error", "part_path", "writer_pid"]

_TOO_MANY_FILES = {
    errno.EMFILE: "this process has as many files open as it may: raise its limit (ulimit -n), or lower max_in_flight",
    errno.ENFILE: "the whole machine has as many files open as it may: close some, or lower max_in_flight",
}

_WRITER = re.compile(r"\.(\d+)-[0-9a-f]{8}\.part$")


def part_path(path: Path) -> Path:
    """Where a file is written before it takes its name: apart from everybody else who writes the same."""
    return path.with_name(f"{path.name}.{os.getpid()}-{uuid4().hex[:8]}.part")


def writer_pid(part: Path) -> int | None:
    """The process that writes, or wrote, a file that `part_path` has named; None of any other."""
    found = _WRITER.search(part.name)
    return None if found is None else int(found[1])


def explain_os_error(error: OSError, remedy: str) -> str:
    """The reason in brackets and the remedy, for the end of a message.

    Args:
        error: what the system said.
        remedy: what to do, unless there are too many open files, for which no folder is to blame.
    """
    return f"({error.strerror or error}): {_TOO_MANY_FILES.get(error.errno or 0, remedy)}"
