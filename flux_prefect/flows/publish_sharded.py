"""Publish the images of a prompt table over many workers."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated, Any, cast

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flux_prefect.batch.context import open_context
from flux_prefect.batch.end_event import batch_end
from flux_prefect.batch.final_state import announce_plan, batch_state, cancelled_state, finish_dry_run
from flux_prefect.batch.planning import check_balance, open_plan
from flux_prefect.batch.shutdown import is_cancelling
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.artifacts import publish_artifacts
from flux_prefect.display.recent_records import RecentRecords
from flux_prefect.display.run_names import initial_run_name
from flux_prefect.flows.form_types import (
    BucketChoice,
    CredentialsChoice,
    CreditCap,
    ImageCap,
    InFlight,
    RowsChoice,
    RowsExpected,
    TableChoice,
    Tolerated,
)
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.manifest.writer import ManifestWriter
from flux_prefect.sharding.active_batch import active_batch_object, hold_active_batch
from flux_prefect.sharding.call_limit import CallLimit
from flux_prefect.sharding.references import reference_bucket, reference_credentials
from flux_prefect.sharding.runs import ShardRuns, check_deployment
from flux_prefect.sharding.session import supervise_shards
from flux_prefect.sharding.shards import split_batch
from flux_prefect.sharding.supervisor import ShardingOptions
from flux_prefect.tables.table import open_table

__all__ = ["publish_sharded"]


def _name_run() -> str:
    return initial_run_name(flow_run.parameters["source"])


@flow(name="publish-sharded", flow_run_name=_name_run)
async def publish_sharded(
    source: TableChoice,
    bucket: BucketChoice,
    credentials: CredentialsChoice = None,
    deployment: str = "publish-shard/worker",
    rows_a_shard: Annotated[int, Field(ge=1)] = 500,
    at_once: Annotated[int, Field(ge=1, le=100)] = 4,
    max_in_flight: InFlight = 32,
    max_failed: Tolerated = 0,
    max_credits: CreditCap = None,
    max_images: ImageCap = None,
    only: RowsChoice = None,
    lost_after_seconds: Annotated[float, Field(ge=5)] = 120,
    min_rows: RowsExpected = 1,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a field of the form, given by name
) -> BatchReport:
    """Publish the images of every row of a table on many workers, under one cap and one pace.

    The same as publish_batch, except that rows which need work are split into shards, each a run of a deployment. A
    shard that is lost with its worker is started again. If this run is cancelled or stopped, so are its shards. After
    that, or after this run was killed, the same call resumes the batch. Two calls at the same time over the same
    table are one batch: the second waits, then reports the result of the first.

    Args:
        source: The same as for publish_batch. Only this run reads it; workers read their shards from the bucket.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name, which all workers can resolve. Its server
            must support conditional writes. Set lease_seconds on the block if workers are on several machines.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the environment, here and on
            the workers. If it names a concurrency limit, the limit is created or resized for this batch.
        deployment: The deployment that runs one shard.
        rows_a_shard: Approximate number of rows of a shard. Each shard is a flow run, so use some hundreds at least.
        at_once: The most shards that run at the same time.
        max_in_flight: The most paid calls at the same time of all shards together, in equal parts; with a concurrency
            limit each shard may use all of them.
        max_failed: How many rows may end without their images before the run counts as Failed.
        max_credits: A hard cap on what all shards together spend, in credits (2,000,000 to the US dollar). What a shard
            does not spend goes to others; what a lost shard may have spent is never assigned again.
        max_images: A hard cap on the number of images that are paid for.
        only: The rows of a manifest (as the source) to try again: failed, flagged, skipped_budget, or unpublished
            for failed and skipped_budget together.
        lost_after_seconds: Seconds without a heartbeat after which a shard counts as lost and is started again. A shard
            that was only disconnected stops paying at its next heartbeat; until then both may pay for the same image,
            unless the bucket has a lease or both are on one host. If this run is killed, the same call also waits
            this long before it resumes the batch.
        min_rows: The run fails if the table has fewer rows, as after a failed export. 0 allows an empty table. Rows
            that `only` leaves out count as well.
        dry_run: Make the plan, then stop. Costs nothing.

    Returns:
        Counts, costs, the address of the manifest, and the plan. A dry run returns only the plan.

    Raises:
        TableError: the table can't be read as a whole.
        TooFewRows: the table has fewer than min_rows rows.
        BucketError: the bucket or its keys are wrong, or it can't be reached for ten minutes.
        ValueError: the deployment is missing, or bucket or credentials are blocks that are not saved.
        BalanceTooLow: the account can't pay for what the plan may cost.
        LeaseLost: this run was disconnected for too long, and another run may have resumed the batch.
        BatchFailed: more than max_failed rows failed, were flagged or were invalid. Its `report` is the whole report.

    Example:
        ```python
        report = await publish_sharded("prompts.csv", "s3://images/catalogue", rows_a_shard=200, dry_run=True)
        print(report.plan)
        ```
    """
    logger = get_run_logger()
    newest = RecentRecords()
    async with AsyncExitStack() as cleanup:
        end = await cleanup.enter_async_context(batch_end(bucket, dry_run=dry_run))
        parameters: dict[str, Any] = {
            "bucket": reference_bucket(bucket),
            "credentials": reference_credentials(credentials),
        }
        destination = end.bucket = await ImageBucket.resolve(bucket)
        account = (await AimlApiCredentials.resolve(credentials)).model_copy(update={"max_in_flight": max_in_flight})
        prefect = await cleanup.enter_async_context(get_client())
        await check_deployment(prefect, deployment)
        limit = CallLimit(prefect, account)
        await limit.resize()
        context = await cleanup.enter_async_context(
            open_context(destination, account, max_credits=max_credits, max_images=max_images)
        )
        table = await cleanup.enter_async_context(open_table(source, only=only, bucket=destination))
        table.check_rows(min_rows)
        if dry_run:
            planned = await cleanup.enter_async_context(open_plan(context, table, run=str(flow_run.id)))
            return cast("BatchReport", await finish_dry_run(planned.plan, source, logger))
        marker = active_batch_object(destination, source, table, only=only, endpoint=account.base_url)
        active_batch = await cleanup.enter_async_context(
            hold_active_batch(destination, marker, lost_after_seconds=lost_after_seconds)
        )
        if (split := active_batch.unfinished) is not None:
            logger.info("Resuming the batch %s", split.run)
        else:
            planned = await cleanup.enter_async_context(open_plan(context, table, run=str(flow_run.id)))
            check_balance(planned.plan)
            split = await split_batch(planned, context, rows_a_shard=rows_a_shard)
            await active_batch.store(split)
        await announce_plan(split.plan, source, logger)
        most = max(1, min(at_once, len(split.shards)))
        parameters["max_in_flight"] = limit.of_each(most)
        manifest = ManifestWriter(destination, split.run, context.spool.root / "manifests")
        end.run, end.manifest = split.run, manifest.uri

        def report_row(record: ItemRecord) -> None:
            newest.add(record)
            end.add(record)

        try:
            report = end.report = await supervise_shards(
                context,
                split,
                manifest,
                active_batch=active_batch,
                runs=ShardRuns(prefect, split.run, deployment),
                options=ShardingOptions(most, lost_after_seconds, parameters, limit.resize),
                on_record=report_row,
                logger=logger,
            )
        except TerminationSignal:
            if not await is_cancelling(str(flow_run.id)):
                raise
            return cast("BatchReport", end.with_state(cancelled_state(manifest.uri)))
        await publish_artifacts(report, newest.records(), destination, context.spool, logger)
        logger.info("%s. Manifest: %s", report.summary(), report.manifest)
        return cast("BatchReport", end.with_state(batch_state(report, max_failed)))
