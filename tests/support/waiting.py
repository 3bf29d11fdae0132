"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_for(
    look: Callable[[], Found | None], *, seconds: float = 60, every: float = 0.02, tell: Callable[[], str] | None = None
) -> Found:
    """Look until something is so.

    Args:
        look: tells what there is; nothing that counts as false.
        seconds: after which it fails.
        every: seconds between two looks.
        tell: what to say of the failure.

    Returns:
        What it was that `look` found.
    """
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise AssertionError("it never came to be so" + ("" if tell is None else f": {tell()}"))
        time.sleep(every)
    return found
