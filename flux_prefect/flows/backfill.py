"""Publish the images of a range of days."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import date
from typing import Annotated, Any, cast

from prefect import flow
from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed
from pydantic import Field

from flux_prefect.api.models import ImageSettings
from flux_prefect.batch.context import current_attempt, summing_up
from flux_prefect.batch.days import BackfillReport, DayOutcome, Order, list_days, remaining_credits
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BackfillFailed, BatchFailed
from flux_prefect.flows.form_types import (
    BucketChoice,
    CredentialsChoice,
    CreditCap,
    InFlight,
    RowsExpected,
    Template,
    TemplateTable,
    Tolerated,
)
from flux_prefect.flows.publish_daily import publish_daily
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.ledger import Sums
from flux_prefect.tables.templates import DEFAULT_IMAGE_SETTINGS

__all__ = ["backfill"]


@flow(name="backfill", flow_run_name="backfill {start} to {end}")
async def backfill(
    source: TemplateTable,
    bucket: BucketChoice,
    start: date,
    end: date,
    order: Order = "oldest first",
    max_days: Annotated[int, Field(ge=1, le=3660)] = 31,
    template: Template = None,
    images: ImageSettings = DEFAULT_IMAGE_SETTINGS,
    credentials: CredentialsChoice = None,
    max_in_flight: InFlight = 8,
    max_failed: Tolerated = 0,
    max_credits: CreditCap = None,
    min_rows: RowsExpected = 1,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a field of the form, given by name
) -> BackfillReport:
    """Publish the images of every day from start to end, one subrun a day, one day after the other.

    The images are the same as those of publish_daily; images that are already published cost nothing, in either
    order. A day that fails does not stop the others.

    Args:
        source: A table of prompt templates, the same as for publish_daily.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name.
        start: The first day.
        end: The last day, inclusive.
        order: The end to start with; images that do not fit under the cap are missing at the other end.
        max_days: The most days in the range, so that a mistyped date is not paid for.
        template: The prompt of rows without one.
        images: Image settings for fields that a row does not set.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the environment.
        max_in_flight: The most paid calls at the same time.
        max_failed: How many rows of a day may end without their images before the day counts as failed.
        max_credits: A hard cap on what all days together spend, in credits (2,000,000 to the US dollar). What does not
            fit is left for the next run and is not a failure.
        min_rows: The run fails if the table has fewer rows, as after a failed export. 0 allows an empty table.
        dry_run: Make the plan of every day, then stop. Costs nothing.

    Returns:
        The outcome of each day.

    Raises:
        ValueError: end is before start, or the range has more than max_days days.
        BackfillFailed: days failed. Its `report` is the whole report.

    Example:
        ```python
        from datetime import date

        rows = [{"id": "fox", "prompt": "a fox on a {{ day | weekday }}"}]
        report = await backfill(rows, "s3://images/daily", start=date(2026, 11, 1), end=date(2026, 11, 2))
        ```
    """
    days = list_days(start, end, max_days, order)
    account = await AimlApiCredentials.resolve(credentials)
    outcomes: list[DayOutcome] = []
    destination = await ImageBucket.resolve(bucket)
    async with AsyncExitStack() as cleanup:
        earlier = Sums()
        if not dry_run:
            earlier = (await cleanup.enter_async_context(summing_up(current_attempt(), destination))).sums
        earlier_credits = earlier.reported_credits
        left = None if max_credits is None else max(0.0, max_credits - earlier.spent.credits)
        for day in days:
            state = cast(
                "State[Any]",
                await publish_daily(
                    source,
                    bucket,
                    template=template,
                    day=day,
                    images=images,
                    credentials=credentials,
                    max_in_flight=max_in_flight,
                    max_failed=max_failed,
                    max_credits=left,
                    min_rows=min_rows,
                    dry_run=dry_run,
                    return_state=True,
                ),
            )
            if state.is_cancelled():
                return cast("BackfillReport", Cancelled(message=f"Cancelled at {day}. {state.message or ''}".strip()))
            result = await state.aresult(raise_on_failure=False)
            report = result.report if isinstance(result, BatchFailed) else result
            day_report = report if isinstance(report, BatchReport) else None
            outcomes.append(DayOutcome(day=day, state=state.name or "", message=state.message or "", report=day_report))
            left = remaining_credits(left, result, account.base_url)
    ended = BackfillReport(days=tuple(outcomes), earlier_credits=earlier_credits)
    await acreate_table_artifact(
        [{"day": str(each.day), "state": each.state, "message": each.message} for each in ended.days],
        key="flux-backfill",
        description=ended.summary(),
    )
    get_run_logger().info("%s", ended.summary())
    if ended.failed:
        error = BackfillFailed(ended.summary(), ended)
        return cast("BackfillReport", Failed(message=error.message, data=error))
    return cast("BackfillReport", Completed(message=ended.summary(), data=ended))
