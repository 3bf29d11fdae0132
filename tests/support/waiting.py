"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_for(
    look: Callable[[], Found | None],
    *,
    seconds: float = 60,
    every: float = 0.02,
    describe: Callable[[], str] | None = None,
) -> Found:
    """Call `look` until it returns something.

    Args:
        look: Returns what was found, or a false value.
        seconds: How long to wait before failing.
        every: Seconds between two looks.
        describe: Returns what to add to the failure's message.

    Returns:
        What `look` found.
    """
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise AssertionError(f"not found within {seconds:g} s" + ("" if describe is None else f": {describe()}"))
        time.sleep(every)
    return found
