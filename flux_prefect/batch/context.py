"""What a batch has in hand before it plans: where to publish, who pays, and how much."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from flux_prefect.api.client import AimlApiClient
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.host.spool import Experience, Spool
from flux_prefect.money.budget import Budget
from flux_prefect.pipeline import check_ready
from flux_prefect.settings import current_settings

__all__ = ["BatchContext", "open_context"]


@dataclass(frozen=True)
class BatchContext:
    """What a batch works with, all of it proved to be usable.

    Attributes:
        bucket: where images are published.
        account: who pays, and how many calls at once.
        client: of the account, shared by all that runs inside `open_context`.
        spool: this host's.
        experience: what this host has learnt of the endpoint in earlier batches.
        budget: the caps.
    """

    bucket: ImageBucket
    account: AimlApiCredentials
    client: AimlApiClient
    spool: Spool
    experience: Experience
    budget: Budget


@asynccontextmanager
async def open_context(
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    *,
    max_credits: float | None,
    max_images: int | None,
    prices: Mapping[str, float] | None = None,
) -> AsyncIterator[BatchContext]:
    """Prove that bucket, account, spool and locks can be used, and hold the client open for the block.

    Args:
        bucket: where to publish.
        credentials: who pays.
        max_credits: the cap, in credits; None for none.
        max_images: the cap, in images that are paid for; None for none.
        prices: the most credits that an image of a model costs, where somebody knows better than this host.

    Raises:
        BucketError: the bucket or its keys are wrong.
        SpoolUnwritable, PermissionError: the spool or the lock folder can't be used.
        ValueError: the account's concurrency limit is missing.
    """
    await check_ready(bucket)
    await credentials.check()
    spool = Spool()
    experience = spool.find_experience(credentials.base_url)
    budget = Budget(
        prices={**experience.prices, **(prices or {})},
        default_price=current_settings().credits_per_image,
        max_credits=max_credits,
        max_images=max_images,
    )
    async with credentials.open_client() as client:
        yield BatchContext(bucket, credentials, client, spool, experience, budget)
