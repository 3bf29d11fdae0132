"""Local files: atomic writes, and messages for disk errors."""

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
    """The temporary path to which a file is written before it is renamed. Unique to each writer."""
    return path.with_name(f"{path.name}.{os.getpid()}-{uuid4().hex[:8]}.part")


def writer_pid(part: Path) -> int | None:
    """The process id in a path from `part_path`, or None for any other path."""
    found = _WRITER.search(part.name)
    return None if found is None else int(found[1])


def explain_os_error(error: OSError, remedy: str) -> str:
    """Describe the reason, in brackets, and the remedy: the end of an error message.

    Args:
        error: the system's error.
        remedy: what to do. Replaced where the cause is too many open files.
    """
    return f"({error.strerror or error}): {_TOO_MANY_FILES.get(error.errno or 0, remedy)}"
