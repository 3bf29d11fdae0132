"""Publish a day's images of a table of prompt templates."""

from __future__ import annotations

import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated, Any, cast
from zoneinfo import ZoneInfo

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flux_prefect.api.models import ImageSettings
from flux_prefect.batch.context import current_attempt, paying_as
from flux_prefect.batch.end_event import batch_end
from flux_prefect.batch.final_state import copy_state
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.flows.form_types import (
    BucketChoice,
    CredentialsChoice,
    CreditCap,
    ImageCap,
    InFlight,
    RowsExpected,
    Template,
    TemplateTable,
    Timezone,
    Tolerated,
)
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.manifest.report import BatchReport
from flux_prefect.tables.templates import DEFAULT_IMAGE_SETTINGS, render_table

__all__ = ["publish_daily"]


def scheduled_day(timezone: str) -> date:
    """Return the day for which the current run was scheduled, also if it is late or retried; today outside of a run."""
    scheduled: date = flow_run.scheduled_start_time.astimezone(ZoneInfo(timezone)).date()
    return scheduled


def _name_run() -> str:
    given = flow_run.parameters
    return f"publish {given['day'] or scheduled_day(given['timezone'])}"


@flow(name="publish-daily", flow_run_name=_name_run)
async def publish_daily(
    source: TemplateTable,
    bucket: BucketChoice,
    template: Template = None,
    day: date | Annotated[None, Field(title="As scheduled")] = None,
    timezone: Timezone = "UTC",
    images: ImageSettings = DEFAULT_IMAGE_SETTINGS,
    credentials: CredentialsChoice = None,
    max_in_flight: InFlight = 8,
    max_failed: Tolerated = 0,
    max_credits: CreditCap = None,
    max_images: ImageCap = None,
    min_rows: RowsExpected = 1,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a field of the form, given by name
) -> BatchReport:
    """Publish one day's images of a table; a day that is already published costs nothing.

    Prompts are Jinja2 templates: `a {{ colour }} {{ name }} on a {{ day | weekday }} in {{ day | season }}`. Their
    variables are the row's columns, `row["a column with spaces"]` and `day`. Seeds are derived from the day and the
    row's id, so a day always has the same images, and another day has others. All rows are rendered before the first
    paid call; a row that can't be rendered stops the run.

    Args:
        source: A .csv, .jsonl or .parquet file (a path, s3://… or https://…), or a list of rows. Its columns are the
            templates' variables; columns named prompt (itself a template), seed, aspect_ratio and so on set the fields
            of the request. Use stable row ids. A .csv or .parquet file needs the column prompt, whose cells may be
            empty.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name.
        template: The prompt of rows without one.
        day: The day to publish. Empty: the day for which the run is scheduled.
        timezone: The time zone of that day, such as Europe/Berlin.
        images: Image settings for fields that a row does not set.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the environment.
        max_in_flight: The most paid calls at the same time.
        max_failed: How many rows may end without their images before the run counts as Failed.
        max_credits: A hard cap on what this run spends, in credits (2,000,000 to the US dollar).
        max_images: A hard cap on the number of images that this run pays for.
        min_rows: The run fails if the table has fewer rows, as after a failed export. 0 allows an empty table.
        dry_run: Render the rows and make the plan, then stop. Costs nothing.

    Returns:
        The report of the batch, the same as publish_batch returns.

    Raises:
        TableError: the table can't be read as a whole.
        TooFewRows: the table has fewer than min_rows rows.
        TemplateFailed: rows can't be rendered. The message has each row's number and missing variable.
        BatchFailed: more than max_failed rows ended without their images. Its `report` is the whole report.

    Example:
        ```python
        rows = [{"id": "fox", "prompt": "a fox in {{ day | season }}"}]
        report = await publish_daily(rows, "s3://images/daily", timezone="Europe/Berlin")
        ```
    """
    chosen = day or scheduled_day(timezone)
    with tempfile.TemporaryDirectory(prefix="flux-daily-") as folder:
        rendered = Path(folder, f"{chosen}.jsonl")
        async with batch_end(bucket, dry_run=dry_run) as end:  # from here on the batch reports its own end
            end.bucket = destination = await ImageBucket.resolve(bucket)
            count = await render_table(source, chosen, rendered, template=template, images=images, bucket=destination)
        get_run_logger().info("Rendered %d rows for %s", count, chosen)
        with paying_as(current_attempt()):
            state: State[Any] = await publish_batch.with_options(flow_run_name=f"images of {chosen}")(
                str(rendered),
                bucket,
                credentials,
                max_in_flight=max_in_flight,
                max_failed=max_failed,
                max_credits=max_credits,
                max_images=max_images,
                min_rows=min_rows,
                dry_run=dry_run,
                return_state=True,
            )
    return cast("BatchReport", copy_state(state, await state.aresult(raise_on_failure=False)))
