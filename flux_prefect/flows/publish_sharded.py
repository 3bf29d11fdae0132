"""Publish the images of a prompt table over many workers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any, cast

from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flux_prefect.batch.context import BatchContext, open_context
from flux_prefect.batch.final_state import announce_plan, batch_state, cancelled_state, finish_dry_run
from flux_prefect.batch.planning import PlannedBatch, add_estimates, check_balance, make_plan
from flux_prefect.batch.shutdown import is_cancelling, sigterm_as_cancellation
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.leases import BucketLeases
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.artifacts import live_progress, publish_artifacts
from flux_prefect.display.events import emit_batch_events
from flux_prefect.display.progress import Progress
from flux_prefect.display.recent_records import RecentRecords
from flux_prefect.display.run_names import initial_run_name
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice, CreditCap, ImageCap, InFlight, Tolerated
from flux_prefect.flows.publish_batch import Table
from flux_prefect.host.spool import Experience
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport, Tally
from flux_prefect.manifest.writer import ManifestWriter
from flux_prefect.sharding.runs import ShardRuns
from flux_prefect.sharding.shards import Split, active_batch_object, split_batch
from flux_prefect.sharding.supervisor import ShardingOptions, Supervisor
from flux_prefect.tables.table import Only, open_table
from flux_prefect.tables.table import Table as Rows

__all__ = ["publish_sharded"]


def _name_run() -> str:
    return initial_run_name(flow_run.parameters["source"])


@flow(name="publish-sharded", flow_run_name=_name_run)
async def publish_sharded(
    source: Table,
    bucket: BucketChoice,
    credentials: CredentialsChoice = None,
    deployment: str = "publish-shard/worker",
    rows_a_shard: Annotated[int, Field(ge=1)] = 500,
    at_once: Annotated[int, Field(ge=1, le=100)] = 4,
    max_in_flight: InFlight = 32,
    max_failed: Tolerated = 0,
    max_credits: CreditCap = None,
    max_images: ImageCap = None,
    only: Annotated[Only, Field(title="Some rows")] | Annotated[None, Field(title="All rows")] = None,
    lost_after_seconds: Annotated[float, Field(ge=5)] = 120,
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
        dry_run: Make the plan, then stop. Costs nothing.

    Returns:
        Counts, costs, the address of the manifest, and the plan. A dry run returns only the plan.

    Raises:
        TableError: the table can't be read as a whole.
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
    shared: dict[str, Any] = {"bucket": _name_bucket(bucket), "credentials": _name_credentials(credentials)}
    destination = await ImageBucket.resolve(bucket)
    account = (await AimlApiCredentials.resolve(credentials)).model_copy(update={"max_in_flight": max_in_flight})
    newest, tally = RecentRecords(), Tally()
    async with AsyncExitStack() as cleanup:
        prefect = await cleanup.enter_async_context(get_client())
        await _check_deployment(prefect, deployment)
        resize = await _size_limit(prefect, account)
        context = await cleanup.enter_async_context(
            open_context(destination, account, max_credits=max_credits, max_images=max_images)
        )
        table = await cleanup.enter_async_context(open_table(source, only=only, bucket=destination))
        if dry_run:
            planned = await _plan(context, table, cleanup)
            return cast("BatchReport", await finish_dry_run(planned.plan, source, logger))
        active_batch = active_batch_object(destination, source, table, only=only, endpoint=account.base_url)
        seen = await active_batch.read()  # another run may end and remove it while this run waits
        lease = await cleanup.enter_async_context(BucketLeases(destination, lost_after_seconds).hold(active_batch.uri))
        if (version := await active_batch.read() or seen) is not None:
            split = Split.model_validate_json(version.content)
            logger.info("Resuming the batch %s", split.run)
        else:
            planned = await _plan(context, table, cleanup)
            check_balance(planned.plan)
            split = await split_batch(planned, context, rows_a_shard=rows_a_shard)
            await active_batch.write(split.model_dump_json().encode(), over=None)
        await announce_plan(split.plan, source, logger)
        most = max(1, min(at_once, len(split.shards)))
        shared["max_in_flight"] = max_in_flight if account.concurrency_limit else max(1, max_in_flight // most)
        manifest = ManifestWriter(destination, split.run, context.spool.root / "manifests")

        def record_row(record: ItemRecord) -> None:
            manifest.append(record)
            tally.add(record)
            newest.add(record)

        supervisor = Supervisor(
            context=context,
            split=split,
            runs=ShardRuns(prefect, split.run, deployment),
            options=ShardingOptions(most, lost_after_seconds, shared, resize),
            on_record=record_row,
            progress=Progress.of(split.plan),
            check_lease=lease.check,
            logger=logger,
        )
        started = time.monotonic()
        try:
            with sigterm_as_cancellation():
                async with manifest, live_progress(supervisor.progress, logger):
                    await supervisor.run()
        except TerminationSignal:
            if not await is_cancelling(str(flow_run.id)):
                raise
            return cast("BatchReport", cancelled_state(manifest.uri))
        if supervisor.complete and (version := await active_batch.read()) is not None:
            await active_batch.remove(version.etag)
    report = _sum_up(tally, supervisor, manifest, time.monotonic() - started)
    context.spool.keep_experience(account.base_url, _learn(context, report, supervisor))
    await publish_artifacts(report, newest.records(), destination, context.spool, logger)
    emit_batch_events(report, destination, split.run, succeeded=report.unsuccessful <= max_failed)
    logger.info("%s. Manifest: %s", report.summary(), report.manifest)
    return cast("BatchReport", batch_state(report, max_failed))


async def _plan(context: BatchContext, table: Rows, cleanup: AsyncExitStack) -> PlannedBatch:
    planned = await make_plan(table, context.bucket, context.account.base_url, context.budget, run=str(flow_run.id))
    cleanup.callback(planned.found.close)
    planned.plan = await add_estimates(
        planned.plan, context.client, context.experience.seconds, context.account.max_in_flight
    )
    return planned


async def _check_deployment(prefect: PrefectClient, deployment: str) -> None:
    try:
        await prefect.read_deployment_by_name(deployment)
    except ObjectNotFound as error:
        raise ValueError(
            f"deployment {deployment!r} does not exist on this Prefect server: deploy deployments/prefect.yaml, or "
            "name the deployment of publish_shard that workers run. PREFECT_API_URL chooses the server."
        ) from error


async def _size_limit(prefect: PrefectClient, account: AimlApiCredentials) -> Callable[[int | None], Awaitable[None]]:
    """Create the account's concurrency limit, if it names one, and return the function that resizes it."""
    name, most = account.concurrency_limit, account.max_in_flight
    size: int | None = None

    async def resize(seen: int | None) -> None:
        nonlocal size
        wanted = most if seen is None else max(1, min(most, seen))
        if name is not None and wanted != size:
            await prefect.upsert_global_concurrency_limit_by_name(name, wanted)
            size = wanted

    await resize(None)
    return resize


def _name_bucket(bucket: ImageBucket | str) -> str:
    if isinstance(bucket, str):
        return bucket
    if bucket._block_document_name is None:  # noqa: SLF001 - the name has no public attribute
        raise ValueError("bucket is a block that is not saved, so no worker can load it: save it, or use s3://name.")
    return bucket.reference


def _name_credentials(credentials: AimlApiCredentials | str | None) -> str | None:
    if credentials is None or isinstance(credentials, str):
        return credentials
    if credentials._block_document_name is None:  # noqa: SLF001 - the name has no public attribute
        raise ValueError("credentials is a block that is not saved, so no worker can load it: save it first.")
    return credentials._block_document_name  # noqa: SLF001 - as above


def _sum_up(tally: Tally, supervisor: Supervisor, manifest: ManifestWriter, seconds: float) -> BatchReport:
    report = tally.report(seconds=seconds, plan=supervisor.split.plan)
    report = report.model_copy(update={"manifest": manifest.uri, "records": manifest.path})
    found = supervisor.reconciliation()
    return report if found is None else report.settle(found)


def _learn(context: BatchContext, report: BatchReport, supervisor: Supervisor) -> Experience:
    """Return this host's experience with the endpoint, with the pace of all workers. Limits stay each worker's own."""
    seconds = context.experience.seconds
    if report.billed_calls:
        seconds = report.seconds * min(context.account.max_in_flight, report.billed_calls) / report.billed_calls
    return context.experience.model_copy(
        update={"prices": {**context.experience.prices, **supervisor.prices}, "seconds": seconds}
    )
