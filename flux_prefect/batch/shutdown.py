"""Ending a batch early without losing what is being paid for at that moment."""

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
_ASK_SECONDS = 2.0  # Prefect kills a cancelled run after 30, and most of them are the calls'


async def run_with_grace(
    work: Coroutine[Any, Any, _Result], stop: Callable[[str], None], *, grace_seconds: float
) -> _Result:
    """Await the work. Where this is cancelled meanwhile, `stop` is called and the work gets time to end by itself.

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
    """Inside the block a SIGTERM cancels the current task; at the end it is given to whoever handled it before.

    So work that minds being cancelled ends in order, and Prefect, whose cancellations come as a SIGTERM, still gets it.
    A second one is handled as before at once. For the event loop of the main thread; elsewhere, where no signal can be
    handled, it does nothing.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    before = signal.getsignal(signal.SIGTERM)
    received = False

    def receive() -> None:
        nonlocal received
        if received or task is None:
            give_back()
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            received = True
            task.cancel()

    def give_back() -> None:
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
        give_back()
        if received:
            os.kill(os.getpid(), signal.SIGTERM)


async def is_cancelling(flow_run_id: str) -> bool:
    """Whether somebody has asked Prefect to cancel a flow run, so that Cancelled is the state for it to end in.

    A run that ends by the SIGTERM itself is Crashed until its runner corrects it, and whoever watches for crashes is
    called. False where Prefect's server can't be asked within two seconds.
    """
    with anyio.move_on_after(_ASK_SECONDS):
        try:
            async with get_client() as client:
                state = (await client.read_flow_run(UUID(flow_run_id))).state
        except (httpx.HTTPError, PrefectException):
            return False
        return state is not None and state.is_cancelling()
    return False
