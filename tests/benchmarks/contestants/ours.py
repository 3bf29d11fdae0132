"""This project's own flow, as it is deployed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.flows.publish_batch import publish_batch

from .contender import BUCKET, Contender, count_calls


@asynccontextmanager
async def compete(in_flight: int, prefix: str, density: Literal["auto", "steps", "chunks"]) -> AsyncIterator[Contender]:
    """The account comes from the environment, as it does for a user."""
    bucket = ImageBucket(bucket_name=BUCKET, prefix=prefix)

    async def publish(table: Path) -> None:
        await publish_batch(str(table), bucket, max_in_flight=in_flight, density=density)

    yield Contender(publish, count_calls(bucket.get_client()))
