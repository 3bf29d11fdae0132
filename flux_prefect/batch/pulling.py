"""Workers that pull: many items, a few at a time, and no more in memory than are being worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")

_ITEMS_BETWEEN_BREATHS = 50


async def for_each(items: Iterable[_Item], work: Callable[[_Item], Awaitable[None]], *, at_once: int) -> None:
    """Do `work` for every item, `at_once` of them at a time; an item is drawn when a worker is free for it.

    The first exception, of the work or of the items, ends it: the other workers are cancelled, waited for, and the
    exception is raised as it is. Work that never waits lets others run every 50 items.
    """
    queue = iter(items)

    async def pull() -> None:
        for number, item in enumerate(queue):
            await work(item)
            if number % _ITEMS_BETWEEN_BREATHS == 0:
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
