"""Records of a batch: the outcome of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.errors import Billed, FluxError, RunStopped
from flux_prefect.money.ledger import Ledger, Sums
from flux_prefect.money.reconciliation import Reconciliation
from flux_prefect.pipeline import ImageOutcome, Production, Status
from flux_prefect.tables.table import Row

__all__ = [
    "UNSUCCESSFUL",
    "ItemRecord",
    "ItemStatus",
    "record_failed",
    "record_invalid",
    "record_production",
    "record_skipped",
    "record_stopped",
    "record_unchanged",
    "settle_calls",
    "sums_of_attempts",
]

ItemStatus = Literal["published", "unchanged", "flagged", "skipped_budget", "failed", "invalid"]

UNSUCCESSFUL: tuple[ItemStatus, ...] = ("failed", "flagged", "invalid")
"""The statuses of rows without their images in the bucket, except rows that a cap left out."""

_WORST_FIRST = (Status.FAILED, Status.FLAGGED, Status.SKIPPED_BUDGET, Status.PUBLISHED, Status.UNCHANGED)


class ItemRecord(BaseModel):
    """The outcome of one row."""

    model_config = ConfigDict(frozen=True)

    row: int = Field(description="The row's place in the table, from 1.")
    id: str = Field(description="The row's id.")
    status: ItemStatus = Field(
        description=(
            "published by this run; unchanged: already in the bucket; flagged by the service; skipped_budget: not sent "
            "because of the cap; failed; or invalid, which is not a valid request."
        )
    )
    request: ImageRequest | None = Field(description="The request with its seed; None for an invalid row.")
    images: tuple[PublishedImage, ...] = Field(default=(), description="The images in the bucket.")
    error: str | None = Field(default=None, description="The class of the first error.")
    message: str | None = Field(default=None, description="The error and its remedy.")
    calls: int = Field(default=0, description="Calls sent by this run, including unbilled ones.")
    billed_calls: int = Field(default=0, description="Calls of this run that were billed for certain.")
    unbilled_calls: int = Field(default=0, description="Calls of this run that cost nothing for certain.")
    unpriced_calls: int = Field(default=0, description="Billed calls whose cost the service did not report.")
    credits_used: float = Field(default=0, description="The cost of the calls as the service reported it, in credits.")
    regenerated: bool = Field(default=False, description="Paid for again because a cached answer's URL had expired.")
    refetched: int = Field(default=0, description="Images downloaded again because the cached file was missing.")
    billed_and_lost: tuple[str, ...] = Field(
        default=(), description="Request ids of calls that were billed and returned no image."
    )
    possibly_billed: tuple[str, ...] = Field(
        default=(),
        description="Request ids of calls whose answer was lost, in this run or an earlier one of this host.",
    )
    carried: dict[str, Any] = Field(default_factory=dict, description="The row's other columns.")
    run: str | None = Field(default=None, description="The id of the flow run.")


def record_invalid(row: Row) -> ItemRecord:
    """Make the record of an invalid row."""
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
    """Make the record of a row whose images were all in the bucket when the batch was planned."""
    return ItemRecord(
        row=row.number, id=row.id, status="unchanged", request=row.request, images=tuple(images), carried=row.carried
    )


def record_skipped(row: Row) -> ItemRecord:
    """Make the record of a row that was not sent because the cap was reached."""
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
    """Make the record of a row that was not tried: the run was stopped, or an earlier error applies to all rows."""
    return ItemRecord(
        row=row.number,
        id=row.id,
        status="failed",
        request=row.request,
        error=type(reason).__name__,
        message=(
            reason.message
            if isinstance(reason, RunStopped)
            else f"Not sent, as an earlier row failed for a reason that all rows share: {reason.message}"
        ),
        carried=row.carried,
    )


def record_failed(row: Row, request: ImageRequest, error: Exception) -> ItemRecord:
    """Make the record of a row whose work raised an exception."""
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
    """Make the record of a row from the outcome of its request, whether it succeeded or failed."""
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
        unbilled_calls=production.unbilled_calls,
        unpriced_calls=production.unpriced_calls,
        credits_used=production.credits_used,
        regenerated=production.regenerated,
        refetched=production.refetched,
        billed_and_lost=tuple(c.client_request_id for c in production.open_calls if c.billed is Billed.YES),
        possibly_billed=tuple(c.client_request_id for c in production.open_calls if c.billed is Billed.UNKNOWN),
        carried=row.carried,
    )


class Owed(Protocol):
    """A record or a report, with the calls that may have been paid for without an image."""

    @property
    def billed_and_lost(self) -> tuple[str, ...]:
        """Calls that were billed and returned no image."""

    @property
    def possibly_billed(self) -> tuple[str, ...]:
        """Calls of unknown cost."""


def sums_of_attempts(owed: Owed, ledger: Ledger, sums: Sums) -> dict[str, Any]:
    """Return the money of all attempts of a run, as fields of its records and its report.

    Args:
        owed: what this attempt found. Of calls of earlier runs, which are not in the ledger, it keeps those of unknown
            cost: the others have been in a report.
        ledger: the run's ledger.
        sums: the ledger's sums, over all calls or over those of one row.
    """
    return {
        **sums.fields(),
        "credits_used": sums.reported_credits,
        "possibly_billed": (*sums.unknown, *(call for call in owed.possibly_billed if call not in ledger)),
    }


def settle_calls(owed: Owed, ledger: Ledger, sums: Sums, found: Reconciliation) -> dict[str, Any]:
    """Return the fields of `sums_of_attempts` after calls of unknown cost were settled, also those of earlier runs."""
    fields = sums_of_attempts(owed, ledger, sums)
    earlier = [call for call in owed.possibly_billed if call not in ledger]
    settled = {*found.billed, *found.not_billed, *found.kept}
    return {
        **fields,
        "billed_and_lost": (*fields["billed_and_lost"], *(call for call in earlier if call in found.billed)),
        "possibly_billed": tuple(call for call in fields["possibly_billed"] if call not in settled),
    }


def _worst(outcomes: list[ImageOutcome]) -> Status:
    return min((outcome.status for outcome in outcomes), key=_WORST_FIRST.index)
