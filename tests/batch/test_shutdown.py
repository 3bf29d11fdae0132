"""Orderly shutdown: grace period and signal."""

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
    """Work that ends some time after it is stopped, unless it is cancelled."""

    def __init__(self, seconds: float) -> None:
        self.reasons: list[str] = []
        self.end: str | None = None
        self._stop = asyncio.Event()
        self._seconds = seconds

    def stop(self, reason: str) -> None:
        """Stop the work."""
        self.reasons.append(reason)
        self._stop.set()

    async def run(self) -> str:
        """Run until stopped or cancelled."""
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
    """Cancel a task that has started."""
    await asyncio.sleep(0.01)
    task.cancel()


class TestGrace:
    """`run_with_grace`."""

    async def test_uncancelled_work_is_awaited(self) -> None:
        """Its result is returned, and `stop` is not called."""
        work = Work(0)

        assert await run_with_grace(asyncio.sleep(0.01, "done"), work.stop, grace_seconds=0) == "done"
        assert work.reasons == []

    async def test_an_exception_of_the_work_is_passed_on(self) -> None:
        """The exception is unchanged."""

        async def fail() -> str:
            await asyncio.sleep(0)
            raise LookupError("lost")

        with pytest.raises(LookupError, match="lost"):
            await run_with_grace(fail(), lambda _: None, grace_seconds=0)

    async def test_cancelled_work_ends_by_itself_within_the_grace(self) -> None:
        """The cancellation is raised after it."""
        work = Work(0.05)
        task = asyncio.create_task(run_with_grace(work.run(), work.stop, grace_seconds=30))
        await cancel_soon(task)
        with pytest.raises(asyncio.CancelledError):
            await task

        assert work.reasons == ["the run was cancelled"]
        assert work.end == "in order"

    async def test_after_the_grace_the_work_is_cancelled(self) -> None:
        """Its cleanup has run when the cancellation is raised."""
        work = Work(60)
        task = asyncio.create_task(run_with_grace(work.run(), work.stop, grace_seconds=0.05))
        await cancel_soon(task)
        with pytest.raises(asyncio.CancelledError):
            await task

        assert work.end == "cancelled"

    async def test_a_second_cancellation_ends_the_grace(self) -> None:
        """The work is cancelled at once."""
        work = Work(60)
        task = asyncio.create_task(run_with_grace(work.run(), work.stop, grace_seconds=60))
        await cancel_soon(task)
        await cancel_soon(task)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, timeout=5)

        assert work.end == "cancelled"

    async def test_a_failure_within_the_grace_does_not_hide_the_cancellation(self) -> None:
        """The cancellation is raised, not the failure."""
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
    """The SIGTERMs that reach the previous handler."""
    numbers: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        numbers.append(number)

    before = signal.signal(signal.SIGTERM, handle)
    yield numbers
    assert signal.getsignal(signal.SIGTERM) is handle
    signal.signal(signal.SIGTERM, before)


class TestSignal:
    """`sigterm_as_cancellation`."""

    async def test_a_signal_cancels_and_is_passed_on_at_the_end(self, received: list[int]) -> None:
        """The work can clean up first."""
        seen = await self._terminate(received, again=False)

        assert seen == []
        assert received == [signal.SIGTERM]

    async def test_without_a_signal_nothing_is_passed_on(self, received: list[int]) -> None:
        """The previous handler is restored."""
        with sigterm_as_cancellation():
            await asyncio.sleep(0)
        assert received == []

        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]

    async def test_a_second_signal_is_passed_on_at_once(self, received: list[int]) -> None:
        """It does not wait until the work has cleaned up."""
        seen = await self._terminate(received, again=True)

        assert seen == [signal.SIGTERM]

    def test_in_another_thread_it_does_nothing(self) -> None:
        """Other threads can't handle signals."""
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
        """Send one SIGTERM, or a second one during cleanup; return those passed on by the end of the cleanup."""
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
    async def test_a_run_that_prefect_cancels_is_cancelling(self) -> None:
        """A run that is not being cancelled is not."""

        @flow
        async def ask() -> State[Any]:
            context = FlowRunContext.get()
            assert context is not None
            assert context.flow_run is not None
            run = context.flow_run.id
            answers.append(await is_cancelling(str(run)))
            async with get_client() as client:
                await client.set_flow_run_state(run, Cancelling())
            answers.append(await is_cancelling(str(run)))
            return Cancelled()

        answers: list[bool] = []
        await ask(return_state=True)

        assert answers == [False, True]

    @pytest.mark.usefixtures("prefect_server")
    async def test_an_unknown_run_is_not_cancelling(self) -> None:
        """An answer without the state never keeps a run from ending."""
        assert not await is_cancelling(str(uuid4()))
