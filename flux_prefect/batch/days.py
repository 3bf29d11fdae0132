"""The days of a backfill: their order, their outcomes, and what they may have spent."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.batch.context import uncapped_budget
from flux_prefect.errors import BalanceTooLow, BatchFailed, TableError
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.budget import describe_credits

__all__ = ["BackfillReport", "DayOutcome", "Order", "list_days", "remaining_credits"]

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
    earlier_credits: float = Field(
        default=0, description="Reported cost of earlier attempts of the same flow run, in credits."
    )

    @property
    def failed(self) -> list[date]:
        """The days whose runs failed."""
        return [outcome.day for outcome in self.days if outcome.failed]

    @property
    def credits_used(self) -> float:
        """Reported cost of all days, in credits, with that of earlier attempts."""
        return self.earlier_credits + sum(
            outcome.report.credits_used for outcome in self.days if outcome.report is not None
        )

    def summary(self) -> str:
        """Summarize the number of days, their cost and the failed days in one line."""
        line = f"{len(self.days) - len(self.failed)} of {len(self.days)} days published"
        line += f", {describe_credits(self.credits_used)}"
        return f"{line}; failed: {', '.join(map(str, self.failed))}" if self.failed else line


def list_days(start: date, end: date, max_days: int, order: Order) -> list[date]:
    """List the days from start to end, inclusive, in the order of their runs.

    Raises:
        ValueError: end is before start, or there are more than max_days days.
    """
    count = (end - start).days + 1
    if count < 1:
        raise ValueError(f"end {end} is before start {start}: swap them")
    if count > max_days:
        raise ValueError(
            f"{start} to {end} are {count:,} days and max_days is {max_days}: correct a date, or raise max_days"
        )
    days = [start + timedelta(days=number) for number in range(count)]
    return days if order == "oldest first" else days[::-1]


def remaining_credits(left: float | None, result: Any, endpoint: str) -> float | None:
    """Return what is left of a cap after a day's run.

    A day without a report may have spent all of it, unless the checks before the first paid call failed.

    Args:
        left: credits before the run; None for no cap.
        result: what the day's run returned or raised.
        endpoint: the root URL of the service. Calls without a reported cost count at their price there.
    """
    if left is None:
        return None
    report = result.report if isinstance(result, BatchFailed) else result
    if isinstance(report, BatchReport):
        return max(0.0, left - _spent_at_most(report, endpoint))
    return left if isinstance(result, (TableError, BalanceTooLow)) else 0.0


def _spent_at_most(report: BatchReport, endpoint: str) -> float:
    spent = report.credits_used
    if report.unknown_calls or report.unpriced_calls:
        budget = uncapped_budget(endpoint)
        for record in report.read():
            unreported = record.calls - record.billed_calls - record.unbilled_calls + record.unpriced_calls
            if record.request is not None and unreported:
                spent += unreported * budget.price_of(record.request).credits
    return spent
