"""The resources of a batch: bucket, account, client, spool and budget."""

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

__all__ = ["BatchContext", "open_context", "uncapped_budget"]


@dataclass(frozen=True)
class BatchContext:
    """The resources of a batch, all of them verified.

    Attributes:
        bucket: the bucket to publish to.
        account: the account that pays, with its limit of calls at once.
        client: the account's client, shared by everything inside `open_context`.
        spool: this host's spool.
        experience: prices, pace and in-flight limit that earlier batches of this host observed at the endpoint.
        budget: the caps of the batch and what it has spent.
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
    """Verify that bucket, account, spool and locks can be used, and keep the client open for the block.

    Args:
        bucket: the bucket to publish to.
        credentials: the account that pays.
        max_credits: the cap in credits, or None.
        max_images: the cap in paid images, or None.
        prices: the most credits that an image costs, by model; overrides the prices that this host observed.

    Raises:
        BucketError: the bucket or its keys are wrong.
        SpoolUnwritable, LocksUnusable: the spool or the lock folder can't be used.
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


def uncapped_budget(endpoint: str) -> Budget:
    """Make a budget without caps, at the prices that this host observed at an endpoint: for estimates."""
    return Budget(prices=Spool().find_experience(endpoint).prices, default_price=current_settings().credits_per_image)
