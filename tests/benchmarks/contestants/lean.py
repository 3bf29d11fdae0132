"""The leanest correct script: no orchestration, no checks, no record of what was paid."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from .contender import BUCKET, MODEL, Contender, Row, count_calls, open_s3, read_table


@asynccontextmanager
async def compete(in_flight: int, prefix: str) -> AsyncIterator[Contender]:
    """One client, connections kept; the limit bounds the paid calls alone, so that the service is never idle."""
    s3 = open_s3(in_flight)
    turns = asyncio.Semaphore(in_flight)
    async with httpx.AsyncClient(
        base_url=os.environ["AIMLAPI_BASE_URL"],
        headers={"Authorization": f"Bearer {os.environ['AIMLAPI_KEY']}"},
        timeout=60,
        limits=httpx.Limits(),  # the default keeps 20 connections and opens the others anew for every call
    ) as http:

        async def publish_one(row: Row) -> None:
            async with turns:
                answer = await http.post(
                    "/v1/images/generations", json={"model": MODEL, "prompt": row.prompt, "seed": row.seed}
                )
            image = await http.get(answer.raise_for_status().json()["images"][0]["url"])
            await asyncio.to_thread(
                s3.put_object,
                Bucket=BUCKET,
                Key=f"{prefix}/{row.id}.jpg",
                Body=image.raise_for_status().content,
                ContentType="image/jpeg",
            )

        async def publish(table: Path) -> None:
            await asyncio.gather(*(publish_one(row) for row in read_table(table)))

        yield Contender(publish, count_calls(s3))
