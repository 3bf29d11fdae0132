"""Orderly shutdown of a batch without losing paid calls in flight."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import UUID

import anyio
import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

__all__ = ["is_cancelling", "run_with_grace", "sigterm_as_cancellation"]

_Result = TypeVar("_Result")
_REQUEST_SECONDS = 2.0  # Prefect kills a cancelled run after 30 s, most of which calls in flight need


async def run_with_grace(
    work: Coroutine[Any, Any, _Result], stop: Callable[[str], None], *, grace_seconds: float
) -> _Result:
    """Await the work. On cancellation, call `stop` and give the work time to end by itself.

    After `grace_seconds`, or a second cancellation, the work is cancelled. The cancellation is raised in any case.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop("the run was cancelled")
        with anyio.move_on_after(grace_seconds, shield=True):
            await asyncio.wait([task])
        raise
    finally:
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])


@contextmanager
def sigterm_as_cancellation() -> Iterator[None]:
    """Cancel the current task on SIGTERM inside the block, and pass the signal to its previous handler at the end.

    Work that handles cancellation so ends in order, and Prefect, which cancels runs by SIGTERM, still receives it. A
    second SIGTERM goes to the previous handler at once. Works in the event loop of the main thread; does nothing in
    other threads, which can't handle signals.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    before = signal.getsignal(signal.SIGTERM)
    received = False

    def receive() -> None:
        nonlocal received
        if received or task is None:
            restore()
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            received = True
            task.cancel()

    def restore() -> None:
        if loop.remove_signal_handler(signal.SIGTERM):
            signal.signal(signal.SIGTERM, before)

    try:
        loop.add_signal_handler(signal.SIGTERM, receive)
    except (ValueError, RuntimeError):
        yield
        return
    try:
        yield
    finally:
        restore()
        if received:
            os.kill(os.getpid(), signal.SIGTERM)


async def is_cancelling(flow_run_id: str) -> bool:
    """Whether Prefect is cancelling a flow run, so that Cancelled is its right final state.

    A run that ends by the SIGTERM itself is Crashed until its runner corrects it, which triggers alerts on crashes.
    Returns False if Prefect's server does not answer within two seconds.
    """
    with anyio.move_on_after(_REQUEST_SECONDS):
        try:
            async with get_client() as client:
                state = (await client.read_flow_run(UUID(flow_run_id))).state
        except (httpx.HTTPError, PrefectException):
            return False
        return state is not None and state.is_cancelling()
    return False
