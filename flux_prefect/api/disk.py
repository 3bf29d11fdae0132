"""What to do about a failure of the disk."""

from __future__ import annotations

import errno

_TOO_MANY_FILES = {
    errno.EMFILE: "this process has as many files open as it may: raise its limit (ulimit -n), or lower max_in_flight",
    errno.ENFILE: "the whole machine has as many files open as it may: close some, or lower max_in_flight",
}


def explain(error: OSError, remedy: str) -> str:
    """The reason in brackets and the remedy, for the end of a message.

    Args:
        error: what the system said.
        remedy: what to do, unless there are too many open files, for which no folder is to blame.
    """
    return f"({error.strerror or error}): {_TOO_MANY_FILES.get(error.errno or 0, remedy)}"
