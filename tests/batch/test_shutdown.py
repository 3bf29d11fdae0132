"""Ending early, in order: the grace, and the signal."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Cancelling

from flux_prefect.batch.shutdown import is_cancelling, run_with_grace, sigterm_as_cancellation


class Work:
    """Work that ends some time after it was told to, unless it is cancelled."""

    def __init__(self, seconds: float) -> None:
        self.told: list[str] = []
        self.end: str | None = None
        self._stop = asyncio.Event()
        self._seconds = seconds

    def stop(self, reason: str) -> None:
        """Tell it."""
        self.told.append(reason)
        self._stop.set()

    async def run(self) -> str:
        """Do it."""
        try:
            await self._stop.wait()
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            self.end = "cancelled"
            raise
        self.end = "in order"
        return self.end


async def cancel_soon(task: asyncio.Task[str]) -> None:
    """Cancel a task that has begun."""
    await asyncio.sleep(0.01)
    task.cancel()


class TestGrace:
    """`run_with_grace`."""

    async def test_work_that_nobody_cancels_is_simply_awaited(self) -> None:
        """Its result is passed on, and it isn't told anything."""
        work = Work(0)

        assert await run_with_grace(asyncio.sleep(0.01, "done"), work.stop, grace_seconds=0) == "done"
        assert work.told == []

    async def test_an_exception_of_the_work_is_passed_on(self) -> None:
        """As it is."""

        async def fail() -> str:
            await asyncio.sleep(0)
            raise LookupError("lost")

        with pytest.raises(LookupError, match="lost"):
            await run_with_grace(fail(), lambda _: None, grace_seconds=0)

    async def test_cancelled_work_ends_by_itself_within_the_grace(self) -> None:
        """And the cancellation goes on after it."""
        work = Work(0.05)
        task = asyncio.create_task(run_with_grace(work.run(), work.stop, grace_seconds=30))
        await cancel_soon(task)
        with pytest.raises(asyncio.CancelledError):
            await task

        assert work.told == ["the run was cancelled"]
        assert work.end == "in order"

    async def test_after_the_grace_the_work_is_cancelled(self) -> None:
        """And has cleaned up when the cancellation goes on."""
        work = Work(60)
        task = asyncio.create_task(run_with_grace(work.run(), work.stop, grace_seconds=0.05))
        await cancel_soon(task)
        with pytest.raises(asyncio.CancelledError):
            await task

        assert work.end == "cancelled"

    async def test_a_second_cancellation_ends_the_grace(self) -> None:
        """Whoever is in a hurry need not wait."""
        work = Work(60)
        task = asyncio.create_task(run_with_grace(work.run(), work.stop, grace_seconds=60))
        await cancel_soon(task)
        await cancel_soon(task)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, timeout=5)

        assert work.end == "cancelled"

    async def test_a_failure_within_the_grace_does_not_hide_the_cancellation(self) -> None:
        """The run was told to end, and that is how it ended."""
        stopped = asyncio.Event()

        async def fail() -> str:
            await stopped.wait()
            raise LookupError("lost")

        task = asyncio.create_task(run_with_grace(fail(), lambda _: stopped.set(), grace_seconds=30))
        await cancel_soon(task)
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture
def received() -> Iterator[list[int]]:
    """The SIGTERMs that get as far as whoever handles them outside."""
    numbers: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        numbers.append(number)

    before = signal.signal(signal.SIGTERM, handle)
    yield numbers
    assert signal.getsignal(signal.SIGTERM) is handle
    signal.signal(signal.SIGTERM, before)


class TestSignal:
    """`sigterm_as_cancellation`."""

    async def test_a_signal_cancels_and_is_handed_on_at_the_end(self, received: list[int]) -> None:
        """The work can clean up in between."""
        seen = await self._terminate(received, again=False)

        assert seen == []
        assert received == [signal.SIGTERM]

    async def test_without_a_signal_nothing_is_handed_on(self, received: list[int]) -> None:
        """And who handled it before handles it again."""
        with sigterm_as_cancellation():
            await asyncio.sleep(0)
        assert received == []

        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]

    async def test_a_second_signal_is_handed_on_at_once(self, received: list[int]) -> None:
        """It is not kept until the work has cleaned up."""
        seen = await self._terminate(received, again=True)

        assert seen == [signal.SIGTERM]

    def test_in_another_thread_it_does_nothing(self) -> None:
        """No signal can be handled there, and none is."""
        before = signal.getsignal(signal.SIGTERM)
        seen: list[Callable[..., object] | int | None] = []

        async def look() -> None:
            with sigterm_as_cancellation():
                seen.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=lambda: asyncio.run(look()))
        thread.start()
        thread.join()

        assert seen == [before]

    async def _terminate(self, received: list[int], *, again: bool) -> list[int]:
        """Be told to end, once or again while cleaning up; what was handed on by the end of that."""
        seen = None
        try:
            with sigterm_as_cancellation():
                os.kill(os.getpid(), signal.SIGTERM)
                try:
                    await asyncio.sleep(60)
                finally:
                    if again:
                        os.kill(os.getpid(), signal.SIGTERM)
                    await asyncio.sleep(0.05)
                    seen = received.copy()
        except asyncio.CancelledError:
            pass
        assert seen is not None
        return seen


class TestCancelling:
    """`is_cancelling`."""

    @pytest.mark.usefixtures("prefect_server")
    async def test_a_run_that_was_asked_to_end_is_to_be_cancelled(self) -> None:
        """One that was not is not."""

        @flow
        async def ask() -> State[Any]:
            context = FlowRunContext.get()
            assert context is not None
            assert context.flow_run is not None
            run = context.flow_run.id
            told.append(await is_cancelling(str(run)))
            async with get_client() as client:
                await client.set_flow_run_state(run, Cancelling())
            told.append(await is_cancelling(str(run)))
            return Cancelled()

        told: list[bool] = []
        await ask(return_state=True)

        assert told == [False, True]

    @pytest.mark.usefixtures("prefect_server")
    async def test_a_run_that_nobody_knows_is_not(self) -> None:
        """A server that can't say never keeps a run from ending."""
        assert not await is_cancelling(str(uuid4()))
