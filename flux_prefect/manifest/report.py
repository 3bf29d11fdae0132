"""The report of a batch: its counts and costs, and access to its records."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.table import Table
from rich.text import Text

from flux_prefect.manifest.plan import Plan
from flux_prefect.manifest.records import UNSUCCESSFUL, ItemRecord, ItemStatus, settle_calls, sums_of_attempts
from flux_prefect.money.budget import describe_credits
from flux_prefect.money.ledger import Ledger
from flux_prefect.money.reconciliation import Reconciliation
from flux_prefect.tables.manifest_lines import read_manifest

__all__ = ["BatchReport", "Tally", "tabulate"]

_MOST_SHOWN = 100


class BatchReport(BaseModel):
    """The outcome of a batch: its counts and costs, and the address of its records.

    Every call of the run is in one of three sums: billed, not billed, or with an unknown outcome.
    """

    model_config = ConfigDict(frozen=True)

    counts: dict[ItemStatus, int] = Field(default_factory=dict, description="The number of rows by status.")
    calls: int = Field(default=0, description="Calls sent by this run, in all its attempts.")
    billed_calls: int = Field(default=0, description="Calls of this run that were billed for certain.")
    unbilled_calls: int = Field(default=0, description="Calls of this run that cost nothing for certain.")
    unpriced_calls: int = Field(default=0, description="Billed calls whose cost the service did not report.")
    credits_used: float = Field(default=0, description="The cost of this run as the service reported it, in credits.")
    billed_and_lost: tuple[str, ...] = Field(
        default=(), description="Request ids of calls that were billed and returned no image."
    )
    possibly_billed: tuple[str, ...] = Field(
        default=(),
        description=(
            "Request ids of calls whose answer was lost, in this run or an earlier one of this host, and whose cost "
            "is unknown."
        ),
    )
    reconciled: str | None = Field(
        default=None,
        description="The entries in the service's log for calls whose answers were lost; None where none were lost.",
    )
    seconds: float = Field(default=0, description="The duration from the first row to the last.")
    plan: Plan | None = Field(default=None, description="The plan made before the first call.")
    dry_run: bool = Field(default=False, description="Whether only the plan was made, as requested.")
    manifest: str | None = Field(default=None, description="The s3:// address of all records as JSON Lines.")
    records: Path | None = Field(default=None, description="The file with all records on the host of the run.")

    def count(self, *statuses: ItemStatus) -> int:
        """Count the rows with one of these statuses."""
        return sum(self.counts.get(status, 0) for status in statuses)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(self.counts.values())

    @property
    def unsuccessful(self) -> int:
        """The number of rows that failed, were flagged or are invalid."""
        return self.count(*UNSUCCESSFUL)

    @property
    def unknown_calls(self) -> int:
        """Calls of this run whose outcome is unknown."""
        return self.calls - self.billed_calls - self.unbilled_calls

    def read(self, *statuses: ItemStatus) -> Iterator[ItemRecord]:
        """Read the records in the table's order, all or those with one of the statuses; one at a time in memory.

        Works on the host of the run. On other hosts, or later, read the manifest.

        Raises:
            TableError: the file is missing.

        Example:
            ```python
            report = await publish_batch("prompts.csv", bucket)
            for item in report.read("failed", "flagged"):
                print(item.id, item.message)
            ```
        """
        if self.records is None:
            return
        for record in read_manifest(self.records):
            if not statuses or record["status"] in statuses:
                yield ItemRecord.model_validate(record)

    @property
    def items(self) -> list[ItemRecord]:
        """All records in memory, read again on each access: for batches of some hundreds of rows. See `read`."""
        return list(self.read())

    def settle(self, found: Reconciliation) -> BatchReport:
        """Return a copy of the report in which calls of unknown outcome are resolved by the service's log."""
        known = {*found.billed, *found.not_billed, *found.kept}
        lost = dict.fromkeys((*self.billed_and_lost, *found.billed))
        return self.model_copy(
            update={
                "billed_and_lost": tuple(lost),
                "possibly_billed": tuple(call for call in self.possibly_billed if call not in known),
                "reconciled": found.summary(),
            }
        )

    def include_attempts(self, ledger: Ledger, found: Reconciliation | None = None) -> BatchReport:
        """Return a copy of the report with the money of all attempts of the run, and what the service's log settled."""
        if found is None:
            return self.model_copy(update=sums_of_attempts(self, ledger, ledger.sums))
        fields = settle_calls(self, ledger, ledger.sums, found)
        return self.model_copy(update={**fields, "reconciled": found.summary()})

    def summary(self) -> str:
        """Summarize the outcome and the cost in one line; for a dry run, the plan."""
        if self.dry_run and self.plan is not None:
            return f"dry run: {self.plan.summary()}"
        names: dict[ItemStatus, str] = {
            "published": "published",
            "unchanged": "already there",
            "skipped_budget": "left out for the cap",
            "flagged": "flagged",
            "failed": "failed",
            "invalid": "invalid",
        }
        outcome = ", ".join(
            f"{self.count(status)} {name}"
            for status, name in names.items()
            if self.count(status) or status == "published"
        )
        billed = f"{self.billed_calls} {'call' if self.billed_calls == 1 else 'calls'} billed"
        line = f"{outcome}; {billed}, {describe_credits(self.credits_used)}"
        if self.unpriced_calls:
            line += f" and {self.unpriced_calls} whose cost the service did not report"
        if self.unbilled_calls:
            line += f"; {self.unbilled_calls} sent and not billed"
        if self.billed_and_lost:
            line += f"; {len(self.billed_and_lost)} billed and lost"
        if self.possibly_billed:
            line += f"; {len(self.possibly_billed)} possibly billed"
        return line


class Tally:
    """The sums over a batch's records, which are added one at a time and not stored."""

    def __init__(self) -> None:
        self._counts: Counter[ItemStatus] = Counter()
        self._sums: Counter[str] = Counter()
        self._credits = 0.0
        self._lost: dict[str, None] = {}
        self._unknown: dict[str, None] = {}

    def add(self, record: ItemRecord) -> None:
        """Count one record."""
        self._counts[record.status] += 1
        for name in ("calls", "billed_calls", "unbilled_calls", "unpriced_calls"):
            self._sums[name] += getattr(record, name)
        self._credits += record.credits_used
        self._lost |= dict.fromkeys(record.billed_and_lost)
        self._unknown |= dict.fromkeys(record.possibly_billed)

    def report(self, *, seconds: float = 0.0, plan: Plan | None = None) -> BatchReport:
        """Make the report of all records added so far."""
        return BatchReport(
            counts=dict(self._counts),
            **self._sums,
            credits_used=self._credits,
            billed_and_lost=tuple(self._lost),
            possibly_billed=tuple(self._unknown),
            seconds=seconds,
            plan=plan,
        )


def tabulate(report: BatchReport) -> Table:
    """Format the report as a table for a terminal: one line for each row, and the sums in the footer.

    A batch of more than a hundred rows shows only rows without their images, at most a hundred of them.
    """
    shown = report.read() if report.rows <= _MOST_SHOWN else report.read(*UNSUCCESSFUL)
    table = Table(show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", footer=f"{report.rows:,} rows", overflow="fold")
    table.add_column("status", footer=f"in {report.seconds:.1f} s")
    table.add_column("seed", justify="right")
    table.add_column("image or error", overflow="fold", footer=_count_hidden(report))
    for item in itertools.islice(shown, _MOST_SHOWN):
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


def _count_hidden(report: BatchReport) -> str:
    hidden = 0 if report.rows <= _MOST_SHOWN else report.rows - min(report.unsuccessful, _MOST_SHOWN)
    return f"{hidden:,} more in the manifest" if hidden else ""
