"""A Prefect flow of stock means, as its documentation teaches: three cached tasks with retries."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from prefect import flow, task
from prefect.cache_policies import INPUTS

from .contender import BUCKET, MODEL, Contender, Row, count_calls, open_s3, read_table


@asynccontextmanager
async def compete(in_flight: int, prefix: str) -> AsyncIterator[Contender]:
    """The clients are shared by all tasks: one made anew in each would cost more than Prefect does."""
    s3 = open_s3(in_flight)
    turns = asyncio.Semaphore(in_flight)
    async with httpx.AsyncClient(
        base_url=os.environ["AIMLAPI_BASE_URL"],
        headers={"Authorization": f"Bearer {os.environ['AIMLAPI_KEY']}"},
        timeout=60,
        limits=httpx.Limits(),
    ) as http:

        @task(cache_policy=INPUTS, persist_result=True, retries=3)
        async def generate(prompt: str, seed: int) -> str:
            answer = await http.post("/v1/images/generations", json={"model": MODEL, "prompt": prompt, "seed": seed})
            url: str = answer.raise_for_status().json()["images"][0]["url"]
            return url

        @task(cache_policy=INPUTS, persist_result=True, retries=3)
        async def download(url: str) -> bytes:
            image = await http.get(url)
            return image.raise_for_status().content

        @task(cache_policy=INPUTS, persist_result=True, retries=3)
        async def upload(image: bytes, key: str) -> str:
            await asyncio.to_thread(s3.put_object, Bucket=BUCKET, Key=key, Body=image, ContentType="image/jpeg")
            return key

        async def publish_one(row: Row) -> None:
            async with turns:
                url = await generate(row.prompt, row.seed)
                await upload(await download(url), f"{prefix}/{row.id}.jpg")

        @flow
        async def plain(table: Path) -> None:
            await asyncio.gather(*(publish_one(row) for row in read_table(table)))

        async def publish(table: Path) -> None:
            await plain(table)

        yield Contender(publish, count_calls(s3))
