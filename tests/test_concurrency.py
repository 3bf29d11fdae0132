from __future__ import annotations

import asyncio
import threading
import time

import anyio
import pytest

from flux_prefect.concurrency import limit_threads, run_in_thread


class Peak:
    """How many callers are inside at once, at the most."""

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def visit(self) -> None:
        """Stay for a moment."""
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(0.02)
        with self._lock:
            self._now -= 1


async def test_no_more_threads_than_the_block_allows() -> None:
    """Also in tasks that were begun inside it; after the block it is anyio's own limit again."""
    peak = Peak()
    with limit_threads(3):
        await asyncio.gather(*(run_in_thread(peak.visit) for _ in range(12)))
    assert peak.most == 3
    await asyncio.gather(*(run_in_thread(peak.visit) for _ in range(12)))
    assert peak.most == 12


async def test_what_a_thread_runs_on_another_loop_does_not_wait_for_this_loop() -> None:
    """Its context is copied there: with the limit in force it would wait for a place that its own caller holds."""

    def elsewhere() -> int:
        return asyncio.run(run_in_thread(lambda: 7))

    with anyio.fail_after(20), limit_threads(1):
        assert await run_in_thread(elsewhere) == 7


async def test_arguments_results_and_errors_pass() -> None:
    """As of a call."""
    assert await run_in_thread(divmod, 7, 2) == (3, 1)
    with limit_threads(1):
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await run_in_thread(divmod, 7, 0)
