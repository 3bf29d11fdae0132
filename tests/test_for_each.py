"""Workers that pull items: bounded, lazy, and gone when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from flux_prefect.concurrency import for_each


async def test_every_item_is_worked_on_once() -> None:
    """Also where there are more workers than items."""
    seen: list[int] = []

    async def work(item: int) -> None:
        await asyncio.sleep(0)
        seen.append(item)

    await for_each(range(100), work, at_once=7)
    await for_each(range(100, 102), work, at_once=7)

    assert sorted(seen) == list(range(102))


async def test_no_items_are_no_work() -> None:
    """And no hang."""

    async def work(_: int) -> None:
        raise AssertionError("there was nothing to do")

    await asyncio.wait_for(for_each((), work, at_once=3), timeout=5)


async def test_as_many_at_once_as_asked_for_and_no_more() -> None:
    """An item is drawn when a worker is free for it, not before."""
    drawn = at_work = peak = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(40):
            drawn += 1
            yield item

    async def work(item: int) -> None:
        nonlocal at_work, peak
        at_work += 1
        peak = max(peak, at_work)
        assert drawn <= item + 4
        await asyncio.sleep(0.001 * (item % 3))
        at_work -= 1

    await for_each(items(), work, at_once=4)

    assert peak == 4


async def test_the_first_exception_ends_it_as_it_is() -> None:
    """The others are cancelled and have cleaned up by then; nothing more is drawn."""
    cleaned: list[int] = []
    begun: list[int] = []

    async def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            await asyncio.sleep(0.01)
            raise LookupError("the third")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(item)

    with pytest.raises(LookupError, match="the third"):
        await for_each(range(100), work, at_once=3)

    assert begun == [0, 1, 2]
    assert sorted(cleaned) == [0, 1]


async def test_an_exception_of_the_items_ends_it() -> None:
    """An error half way through a table is raised unchanged."""

    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("line 6")

    async def work(_: int) -> None:
        await asyncio.sleep(0)

    with pytest.raises(ValueError, match="line 6"):
        await for_each(items(), work, at_once=2)


async def test_cancelled_it_waits_for_its_workers() -> None:
    """No work goes on behind its back."""
    cleaned: list[int] = []

    async def work(item: int) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(item)

    task = asyncio.create_task(for_each(range(10), work, at_once=3))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert cleaned == [0, 1, 2]


async def test_work_that_never_waits_lets_others_run() -> None:
    """A million rows that are all published already don't stop the rest of the process."""
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def work(_: int) -> None:
        return

    ticking = asyncio.create_task(tick())
    await for_each(range(1_000), work, at_once=1)
    ticking.cancel()

    assert turns >= 1_000 // 50
