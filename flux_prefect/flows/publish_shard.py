"""Publish one shard of a batch. `publish_sharded` starts this flow on workers; do not start it by hand."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated, Any, cast

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Crashed
from pydantic import Field

from flux_prefect.batch.context import open_context
from flux_prefect.batch.final_state import cancelled_state
from flux_prefect.batch.shutdown import is_cancelling
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import ShardSuperseded
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice, CreditCap, ImageCap, InFlight
from flux_prefect.manifest.writer import ManifestWriter
from flux_prefect.sharding.session import execute_shard
from flux_prefect.tables.table import open_table

__all__ = ["publish_shard"]


@flow(name="publish-shard")
async def publish_shard(
    source: str,
    bucket: BucketChoice,
    credentials: CredentialsChoice = None,
    max_in_flight: InFlight = 8,
    max_credits: CreditCap = None,
    max_images: ImageCap = None,
    prices: Annotated[dict[str, float], Field(description="Credits that an image costs, by model.")] | None = None,
    sign_seconds: Annotated[float, Field(gt=0)] = 15,
) -> dict[str, int]:
    """Publish the rows of one shard, under its allowance and pace. Rows that fail do not fail the run.

    Meanwhile its heartbeats in the bucket report progress and spending. The manifest of its rows is stored beside
    them; the batch merges the manifests of all shards. If the batch marks this run as lost, it stops paying.

    Args:
        source: The shard's table, which the batch has written.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the worker's environment.
        max_in_flight: The most paid calls at the same time.
        max_credits: The share of the batch's cap, in credits.
        max_images: The share of the batch's cap, in images.
        prices: Credits that the batch expects an image to cost, by model.
        sign_seconds: Seconds between two heartbeats.

    Returns:
        The number of rows by final status.

    Raises:
        BucketError: the bucket or its keys are wrong.
        SpoolUnwritable, LocksUnusable: the worker's spool or lock folder can't be used.
        ValueError: the worker's environment has no key, or no block of that name exists.
    """
    logger = get_run_logger()
    destination = await ImageBucket.resolve(bucket)
    account = (await AimlApiCredentials.resolve(credentials)).model_copy(update={"max_in_flight": max_in_flight})
    run = str(flow_run.id)
    async with AsyncExitStack() as cleanup:
        context = await cleanup.enter_async_context(
            open_context(destination, account, max_credits=max_credits, max_images=max_images, prices=prices)
        )
        table = await cleanup.enter_async_context(open_table(source, bucket=destination))
        manifest = ManifestWriter(destination, run, context.spool.root / "manifests", copies=None)
        try:
            report = await execute_shard(
                context, table, manifest, run=run, heartbeat_seconds=sign_seconds, logger=logger
            )
        except ShardSuperseded as lost:
            return cast("dict[str, int]", Crashed(message=lost.message))
        except TerminationSignal:
            if not await is_cancelling(run):
                raise
            return cast("dict[str, int]", cancelled_state(manifest.uri))
    state: State[Any] = Completed(message=report.summary(), data=report.counts)
    return cast("dict[str, int]", state)
