"""What Prefect itself costs: a flow with three tasks an image that do nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from prefect import flow, task

from .contender import Contender, read_table


@asynccontextmanager
async def compete(in_flight: int) -> AsyncIterator[Contender]:
    """It publishes nothing."""
    turns = asyncio.Semaphore(in_flight)

    @task
    async def generate(row: str) -> str:
        return row

    @task
    async def download(row: str) -> str:
        return row

    @task
    async def upload(row: str) -> str:
        return row

    async def publish_one(row: str) -> None:
        async with turns:
            await upload(await download(await generate(row)))

    @flow
    async def empty(table: Path) -> None:
        await asyncio.gather(*(publish_one(row.id) for row in read_table(table)))

    async def publish(table: Path) -> None:
        await empty(table)

    yield Contender(publish)
