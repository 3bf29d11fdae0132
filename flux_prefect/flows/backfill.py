"""Publish the images of a range of days."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Annotated, Any, Literal, cast

from prefect import flow
from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BackfillFailed, BalanceTooLow, BatchFailed, TableError
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice, CreditCap, InFlight, Tolerated
from flux_prefect.flows.publish_daily import Template, TemplateTable, publish_daily
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.budget import Budget, describe_credits
from flux_prefect.settings import current_settings
from flux_prefect.tables.templates import DEFAULT_IMAGE_SETTINGS, ImageSettings

__all__ = ["BackfillReport", "DayOutcome", "backfill"]

Order = Literal["oldest first", "newest first"]


class DayOutcome(BaseModel):
    """The outcome of one day."""

    model_config = ConfigDict(frozen=True)

    day: date = Field(description="The day.")
    state: str = Field(description="The name of the Prefect state in which its run ended.")
    message: str = Field(description="The message of that state.")
    report: BatchReport | None = Field(description="The batch's report; None if the batch did not start.")

    @property
    def failed(self) -> bool:
        """Whether the day's run ended in a state other than Completed."""
        return self.state != "Completed"


class BackfillReport(BaseModel):
    """The outcomes of a range of days, in the order of their runs."""

    model_config = ConfigDict(frozen=True)

    days: tuple[DayOutcome, ...] = Field(description="One outcome a day.")

    @property
    def failed(self) -> list[date]:
        """The days whose runs failed."""
        return [outcome.day for outcome in self.days if outcome.failed]

    @property
    def credits_used(self) -> float:
        """Reported cost of all days, in credits."""
        return sum(outcome.report.credits_used for outcome in self.days if outcome.report is not None)

    def summary(self) -> str:
        """Summarize the number of days, their cost and the failed days in one line."""
        line = f"{len(self.days) - len(self.failed)} of {len(self.days)} days published"
        line += f", {describe_credits(self.credits_used)}"
        return f"{line}; failed: {', '.join(map(str, self.failed))}" if self.failed else line


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
    days = _list_days(start, end, max_days, order)
    account = await AimlApiCredentials.resolve(credentials)
    outcomes: list[DayOutcome] = []
    left = max_credits
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
        if left is not None:
            left = 0.0 if _may_have_spent_all(result) else max(0.0, left - _spent_at_most(day_report, account.base_url))
    ended = BackfillReport(days=tuple(outcomes))
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


def _list_days(start: date, end: date, max_days: int, order: Order) -> list[date]:
    count = (end - start).days + 1
    if count < 1:
        raise ValueError(f"end {end} is before start {start}: swap them")
    if count > max_days:
        raise ValueError(
            f"{start} to {end} are {count:,} days and max_days is {max_days}: correct a date, or raise max_days"
        )
    days = [start + timedelta(days=number) for number in range(count)]
    return days if order == "oldest first" else days[::-1]


def _may_have_spent_all(result: Any) -> bool:
    """Whether a day ended without a report for another reason than the checks before the first paid call."""
    return not isinstance(result, (BatchReport, BatchFailed, TableError, BalanceTooLow))


def _spent_at_most(report: BatchReport | None, endpoint: str) -> float:
    """Return a day's cost in credits. Calls without a reported cost count at their price."""
    if report is None:
        return 0.0
    spent = report.credits_used
    if report.unknown_calls or report.unpriced_calls:
        budget = Budget(
            prices=Spool().find_experience(endpoint).prices, default_price=current_settings().credits_per_image
        )
        for item in report.read():
            unreported = item.calls - item.billed_calls - item.unbilled_calls + item.unpriced_calls
            if item.request is not None and unreported:
                spent += unreported * budget.price_of(item.request).credits
    return spent
