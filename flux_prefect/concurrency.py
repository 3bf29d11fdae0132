"""Bounded concurrency: blocking work in a limited number of threads, and a few items of many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import anyio
import anyio.to_thread
from typing_extensions import TypeVarTuple, Unpack

__all__ = ["for_each", "limit_threads", "run_in_thread", "run_to_end"]

_R = TypeVar("_R")
_Item = TypeVar("_Item")
_Args = TypeVarTuple("_Args")

_ITEMS_BETWEEN_PAUSES = 50

# Stored with its event loop: a context can be copied to another loop, where this limiter must not be awaited.
_limit: ContextVar[tuple[asyncio.AbstractEventLoop, anyio.CapacityLimiter] | None] = ContextVar("limit", default=None)


@contextmanager
def limit_threads(max_threads: int) -> Iterator[None]:
    """Limit the threads that all `run_in_thread` calls inside the block use at a time, on this event loop.

    Threads that run Python code compete with the event loop for the interpreter's lock. A batch that keeps one core
    busy takes up to a tenth longer with forty threads than with eight.
    """
    token = _limit.set((asyncio.get_running_loop(), anyio.CapacityLimiter(max_threads)))
    try:
        yield
    finally:
        _limit.reset(token)


async def run_in_thread(work: Callable[[Unpack[_Args]], _R], *args: Unpack[_Args]) -> _R:
    """Run `work` in a worker thread and return its result: at most 40 at once, or as many as `limit_threads` allows.

    A cancelled caller waits until work that has started ends.
    """
    limit = _limit.get()
    limiter = limit[1] if limit is not None and limit[0] is asyncio.get_running_loop() else None
    return await anyio.to_thread.run_sync(work, *args, limiter=limiter)


async def run_to_end(work: Callable[[Unpack[_Args]], _R], *args: Unpack[_Args]) -> _R:
    """What `work` returns and raises, run in a thread and awaited to its end although the caller is cancelled.

    The thread has its work before anything is awaited. For what must not be lost: the cancellation goes on afterwards.
    """
    with anyio.CancelScope(shield=True):
        # A task's own `cancel` passes the shield, so the future has one of its own.
        working = asyncio.get_running_loop().run_in_executor(None, work, *args)
        try:
            await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait([working])
            raise
    return working.result()


async def for_each(items: Iterable[_Item], work: Callable[[_Item], Awaitable[None]], *, at_once: int) -> None:
    """Run `work` for every item, `at_once` of them at a time. An item is drawn when a worker is free.

    The first exception, from the work or from the iterator, stops everything: the other workers are cancelled and
    awaited, and the exception is raised unchanged. Work that never awaits yields to the event loop every 50 items.
    """
    queue = iter(items)

    async def pull() -> None:
        for number, item in enumerate(queue):
            await work(item)
            if number % _ITEMS_BETWEEN_PAUSES == 0:
                await asyncio.sleep(0)

    workers = [asyncio.create_task(pull()) for _ in range(at_once)]
    try:
        done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        for worker in done:
            worker.result()
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
