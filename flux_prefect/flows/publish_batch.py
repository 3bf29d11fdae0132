"""Publish the images of a prompt table."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Literal, cast

from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flux_prefect.batch.context import current_attempt, open_context
from flux_prefect.batch.end_event import batch_end
from flux_prefect.batch.engine import choose_density
from flux_prefect.batch.final_state import announce_plan, batch_state, cancelled_state, finish_dry_run
from flux_prefect.batch.planning import check_balance, open_plan
from flux_prefect.batch.session import execute_batch
from flux_prefect.batch.shutdown import is_cancelling
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.artifacts import publish_artifacts
from flux_prefect.display.events import emit_item_events
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
from flux_prefect.tables.table import open_table

__all__ = ["publish_batch"]


def _name_run() -> str:
    return initial_run_name(flow_run.parameters["source"])


@flow(name="publish-batch", flow_run_name=_name_run)
async def publish_batch(
    source: TableChoice,
    bucket: BucketChoice,
    credentials: CredentialsChoice = None,
    max_in_flight: InFlight = 8,
    max_failed: Tolerated = 0,
    max_credits: CreditCap = None,
    max_images: ImageCap = None,
    only: RowsChoice = None,
    density: Literal["auto", "steps", "chunks"] = "auto",
    min_rows: RowsExpected = 1,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a field of the form, given by name
) -> BatchReport:
    """Publish the images of every row of a table; images that are already published cost nothing.

    A bad row or a failed image never stops the others. The table, the bucket, the keys and the spool are checked
    before the first paid call.

    Args:
        source: A .csv, .jsonl or .parquet file (a path, s3://… or https://…) with the columns id, prompt, seed,
            aspect_ratio, output_format, guidance_scale, safety_tolerance, num_images, model (only prompt is required;
            others are copied to the manifest), the manifest of an earlier run, or a list of requests.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the environment.
        max_in_flight: The most paid calls at the same time.
        max_failed: How many rows may end without their images before the run counts as Failed.
        max_credits: A hard cap on what this run spends, in credits (2,000,000 to the US dollar). What does not fit is
            left for the next run and is not a failure. A retry of the run goes on under the same caps.
        max_images: A hard cap on the number of images that this run pays for.
        only: The rows of a manifest (as the source) to try again: failed, flagged, skipped_budget, or unpublished
            for failed and skipped_budget together.
        density: steps has three task runs an image and suits some hundreds of images; chunks has one task run a hundred
            rows and suits thousands. Images, records and costs are the same. auto selects chunks from 300 rows with
            work to do.
        min_rows: The run fails if the table has fewer rows, as after a failed export. 0 allows an empty table. Rows
            that `only` leaves out count as well.
        dry_run: Make the plan, then stop. Costs nothing.

    Returns:
        Counts, costs, the address of the manifest, and the plan. A dry run returns only the plan.

    Raises:
        TableError: the table can't be read as a whole.
        TooFewRows: the table has fewer than min_rows rows.
        BucketError: the bucket or its keys are wrong.
        SpoolUnwritable, LocksUnusable: the spool or the lock folder can't be used.
        BalanceTooLow: the account can't pay for what the plan may cost.
        BatchFailed: more than max_failed rows failed, were flagged or were invalid. Its `report` is the whole report.

    Example:
        ```python
        report = await publish_batch("prompts.csv", "s3://images/catalogue", max_credits=2_000_000)
        print(report.summary())
        ```
    """
    logger = get_run_logger()
    newest = RecentRecords()
    async with AsyncExitStack() as cleanup:
        end = await cleanup.enter_async_context(batch_end(bucket, dry_run=dry_run))
        destination = end.bucket = await ImageBucket.resolve(bucket)
        account = (await AimlApiCredentials.resolve(credentials)).model_copy(update={"max_in_flight": max_in_flight})
        context = await cleanup.enter_async_context(
            open_context(
                destination,
                account,
                max_credits=max_credits,
                max_images=max_images,
                ledger_of=None if dry_run else current_attempt(),
            )
        )
        end.ledger = context.budget.ledger
        table = await cleanup.enter_async_context(open_table(source, only=only, bucket=destination))
        table.check_rows(min_rows)
        planned = await cleanup.enter_async_context(open_plan(context, table, run=str(flow_run.id)))
        if dry_run:
            return cast("BatchReport", await finish_dry_run(planned.plan, source, logger))
        await announce_plan(planned.plan, source, logger)
        check_balance(planned.plan)
        chosen = choose_density(planned.plan) if density == "auto" else density
        manifest = ManifestWriter(destination, planned.run, context.spool.root / "manifests")
        end.manifest = manifest.uri

        def report_row(record: ItemRecord) -> None:
            newest.add(record)
            end.add(record)
            emit_item_events(record, destination, planned.run, density=chosen)

        try:
            result = await execute_batch(
                context, planned, manifest, density=chosen, on_record=report_row, logger=logger
            )
        except TerminationSignal:
            if not await is_cancelling(flow_run.id):
                raise
            return cast("BatchReport", end.with_state(cancelled_state(manifest.uri)))
        report = end.report = result.report
        await publish_artifacts(report, newest.records(), destination, context.spool, logger)
        logger.info("%s. Manifest: %s", report.summary(), report.manifest)
        return cast("BatchReport", end.with_state(batch_state(report, max_failed)))
