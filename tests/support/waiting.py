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
    """Look until something is so.

    Args:
        look: returns what was found, or a false value.
        seconds: after which it fails.
        every: seconds between two looks.
        describe: returns what to add to the failure's message.

    Returns:
        What it was that `look` found.
    """
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise AssertionError("it never came to be so" + ("" if describe is None else f": {describe()}"))
        time.sleep(every)
    return found
