"""Blocking work off the event loop, in no more threads at once than do it any good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import anyio
import anyio.to_thread
from typing_extensions import TypeVarTuple, Unpack

_R = TypeVar("_R")
_Args = TypeVarTuple("_Args")

# With its event loop, as a context is copied to others, where it must not be waited for.
_limit: ContextVar[tuple[asyncio.AbstractEventLoop, anyio.CapacityLimiter] | None] = ContextVar("limit", default=None)


@contextmanager
def limit_threads(most: int) -> Iterator[None]:
    """At most so many threads at a time for all `run_in_thread` inside the block, on this event loop.

    Each thread that has Python code to run waits for the interpreter's lock, and the event loop waits among them: with
    forty of them at work a batch that keeps one core busy takes up to a tenth longer than with eight.
    """
    token = _limit.set((asyncio.get_running_loop(), anyio.CapacityLimiter(most)))
    try:
        yield
    finally:
        _limit.reset(token)


async def run_in_thread(work: Callable[[Unpack[_Args]], _R], *args: Unpack[_Args]) -> _R:
    """What `work` gives and raises, run in a thread of anyio's: at most 40 at once, or as `limit_threads` says.

    A cancelled caller waits for the end of what has begun.
    """
    limit = _limit.get()
    limiter = limit[1] if limit is not None and limit[0] is asyncio.get_running_loop() else None
    return await anyio.to_thread.run_sync(work, *args, limiter=limiter)
