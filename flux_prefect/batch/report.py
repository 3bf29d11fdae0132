"""What a batch tells of itself: a record an item, and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.table import Table
from rich.text import Text

from flux_prefect.api.errors import Billed, FluxError
from flux_prefect.api.models import ImageRequest
from flux_prefect.batch.plan import Plan
from flux_prefect.batch.table import Row
from flux_prefect.bucket import PublishedImage
from flux_prefect.budget import describe_credits
from flux_prefect.pipeline import ImageOutcome, Production, Status

ItemStatus = Literal["published", "unchanged", "flagged", "skipped_budget", "failed", "invalid"]

_WORST_FIRST = (Status.FAILED, Status.FLAGGED, Status.SKIPPED_BUDGET, Status.PUBLISHED, Status.UNCHANGED)


class ItemRecord(BaseModel):
    """What became of one row."""

    model_config = ConfigDict(frozen=True)

    row: int = Field(description="The row's place in the table, from 1.")
    id: str = Field(description="The row's id.")
    status: ItemStatus = Field(
        description=(
            "published by this run, unchanged since before, flagged by the service, skipped_budget as it did not fit "
            "under the cap, failed, or an invalid row."
        )
    )
    request: ImageRequest | None = Field(description="The request with its seed; None for an invalid row.")
    images: tuple[PublishedImage, ...] = Field(default=(), description="The pictures in the bucket.")
    error: str | None = Field(default=None, description="The class of the first error.")
    message: str | None = Field(default=None, description="What happened and what to do.")
    calls: int = Field(default=0, description="Calls sent by this run, unbilled ones among them.")
    billed_calls: int = Field(default=0, description="Calls of this run that were billed for certain.")
    unpriced_calls: int = Field(default=0, description="Billed calls whose cost the service did not say.")
    credits_used: float = Field(default=0, description="What the service said that they cost, in credits.")
    regenerated: bool = Field(default=False, description="Paid for anew because a cached answer's URL had died.")
    refetched: int = Field(default=0, description="Pictures fetched anew because the cached file was gone.")
    billed_and_lost: tuple[str, ...] = Field(
        default=(), description="Request ids of calls that were billed and brought nothing."
    )
    possibly_billed: tuple[str, ...] = Field(
        default=(),
        description="Request ids of calls whose answer was lost, in this run or an earlier one of this host.",
    )
    carried: dict[str, Any] = Field(default_factory=dict, description="The row's other columns.")
    run: str | None = Field(default=None, description="Prefect's id of the flow run.")


class BatchReport(BaseModel):
    """What became of a batch: counts, costs, and a record for every row in the table's order."""

    model_config = ConfigDict(frozen=True)

    items: tuple[ItemRecord, ...] = Field(description="One record a row.")
    seconds: float = Field(description="From the first row to the last.")
    plan: Plan | None = Field(default=None, description="What was known before the first call.")
    manifest: str | None = Field(default=None, description="The s3:// address of the same records as JSON Lines.")

    def count(self, status: ItemStatus) -> int:
        """How many items ended so."""
        return sum(item.status == status for item in self.items)

    @property
    def unsuccessful(self) -> list[ItemRecord]:
        """The items without their pictures in the bucket: failed, flagged or invalid."""
        return [item for item in self.items if item.status in {"failed", "flagged", "invalid"}]

    @property
    def billed_calls(self) -> int:
        """Calls of this run that were billed for certain."""
        return sum(item.billed_calls for item in self.items)

    @property
    def credits_used(self) -> float:
        """What the service said that this run cost, in credits."""
        return sum(item.credits_used for item in self.items)

    @property
    def possibly_billed(self) -> list[str]:
        """Request ids of calls that may have been billed: to be looked up in the service's log."""
        return list(dict.fromkeys(call for item in self.items for call in item.possibly_billed))

    def summary(self) -> str:
        """One line: what was published, what was not, what it cost. Of a dry run: the plan."""
        if self.plan is not None and not self.items:
            return f"dry run: {self.plan.summary()}"
        counts = {
            "published": self.count("published"),
            "already there": self.count("unchanged"),
            "left out for the cap": self.count("skipped_budget"),
            "flagged": self.count("flagged"),
            "failed": self.count("failed"),
            "invalid": self.count("invalid"),
        }
        told = ", ".join(f"{number} {name}" for name, number in counts.items() if number or name == "published")
        billed = f"{self.billed_calls} {'call' if self.billed_calls == 1 else 'calls'} billed"
        line = f"{told}; {billed}, {describe_credits(self.credits_used)}"
        if unpriced := sum(item.unpriced_calls for item in self.items):
            line += f" and {unpriced} whose cost the service did not say"
        if lost := len({call for item in self.items for call in item.billed_and_lost}):
            line += f"; {lost} billed and lost"
        if unknown := len(self.possibly_billed):
            line += f"; {unknown} possibly billed"
        return line


class BatchFailed(FluxError):
    """More items ended without their pictures than the batch tolerates.

    Attributes:
        report: the whole report; what was published is published.
    """

    def __init__(self, message: str, report: BatchReport) -> None:
        super().__init__(message)
        self.report = report


def tabulate(report: BatchReport) -> Table:
    """The report as a table for a terminal: an item a line, sums at the foot."""
    table = Table(show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", footer=f"{len(report.items)} items", overflow="fold")
    table.add_column("status", footer=f"in {report.seconds:.1f} s")
    table.add_column("seed", justify="right")
    table.add_column("where, or why not", overflow="fold")
    for item in report.items:
        table.add_row(
            Text(item.id),
            item.status,
            "" if item.request is None else str(item.request.seed),
            Text(
                "\n".join(image.key.rpartition("/")[2] for image in item.images)
                if item.message is None
                else item.message
            ),
        )
    return table


def record_invalid(row: Row) -> ItemRecord:
    """The record of a row that is no request."""
    return ItemRecord(
        row=row.number,
        id=row.id,
        status="invalid",
        request=None,
        error="InvalidRow",
        message=row.error,
        carried=row.carried,
    )


def record_unchanged(row: Row, images: Sequence[PublishedImage]) -> ItemRecord:
    """The record of a row whose pictures were all there when the batch was planned."""
    return ItemRecord(
        row=row.number, id=row.id, status="unchanged", request=row.request, images=tuple(images), carried=row.carried
    )


def record_skipped(row: Row) -> ItemRecord:
    """The record of a row that did not fit under the cap any more."""
    return ItemRecord(
        row=row.number,
        id=row.id,
        status="skipped_budget",
        request=row.request,
        error="BudgetExhausted",
        message="Not sent: the cap is reached. The next run picks it up.",
        carried=row.carried,
    )


def record_stopped(row: Row, reason: FluxError) -> ItemRecord:
    """The record of a row that was not tried, as an earlier one failed for a reason that all rows share."""
    return ItemRecord(
        row=row.number,
        id=row.id,
        status="failed",
        request=row.request,
        error=type(reason).__name__,
        message=f"Not sent, as an earlier row failed for a reason that all rows share: {reason.message}",
        carried=row.carried,
    )


def record_failed(row: Row, request: ImageRequest, error: Exception) -> ItemRecord:
    """The record of a row whose work ended with an exception."""
    return ItemRecord(
        row=row.number,
        id=row.id,
        status="failed",
        request=request,
        error=type(error).__name__,
        message=str(error) or repr(error),
        carried=row.carried,
    )


def record_production(row: Row, production: Production) -> ItemRecord:
    """The record of a row whose request was carried through, to whatever end."""
    error = production.error
    return ItemRecord(
        row=row.number,
        id=row.id,
        status=_worst(production.images).value,
        request=production.request,
        images=tuple(outcome.image for outcome in production.images if outcome.image is not None),
        error=None if error is None else type(error).__name__,
        message=None if error is None else error.message,
        calls=len(production.calls),
        billed_calls=sum(call.billed is Billed.YES for call in production.calls),
        unpriced_calls=production.unpriced_calls,
        credits_used=production.credits_used,
        regenerated=production.regenerated,
        refetched=production.refetched,
        billed_and_lost=tuple(c.client_request_id for c in production.open_calls if c.billed is Billed.YES),
        possibly_billed=tuple(c.client_request_id for c in production.open_calls if c.billed is Billed.UNKNOWN),
        carried=row.carried,
    )


def _worst(outcomes: list[ImageOutcome]) -> Status:
    return min((outcome.status for outcome in outcomes), key=_WORST_FIRST.index)
