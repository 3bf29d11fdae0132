"""Reconciliation of calls whose answers were lost with the service's log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import anyio.to_thread

from flux_prefect.api.client import LOG_PAGE_ROWS, AimlApiClient
from flux_prefect.api.models import LogEntry
from flux_prefect.errors import AnswerLost, Billed, ServiceError, SpoolUnreadable
from flux_prefect.host.spool import PaidCall, Spool
from flux_prefect.money.budget import describe_credits

__all__ = ["MAX_PAGES", "Reconciliation", "reconcile"]

MAX_PAGES = 50
"""The most pages that one `reconcile` reads, 5,000 rows: a quarter of what the service allows in a minute."""

_MARGIN = timedelta(minutes=15)
"""Time around `sent_at`: covers clock differences, waits between sends, and logs that note when a call ended."""


@dataclass(frozen=True)
class Reconciliation:
    """Findings of the log about calls of unknown outcome, by the ids that we sent with the calls.

    Attributes:
        billed: paid, with the answer lost: the credits of each call, or None if the log doesn't name them.
        not_billed: failed, which costs nothing.
        kept: paid, and the answer is in the spool: the process died before it closed the call.
        unknown: not in the pages that were read, or not decided in the log yet.
        reason: why the log was not read completely, if calls stay unknown because of that; else None.
    """

    billed: dict[str, float | None] = field(default_factory=dict)
    not_billed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    reason: str | None = None

    def summary(self) -> str:
        """Summarize the findings in one line for a log."""
        spent = describe_credits(sum(cost for cost in self.billed.values() if cost is not None))
        parts = [
            f"{count} {what}"
            for count, what in (
                (len(self.billed), f"billed and lost ({spent})"),
                (len(self.not_billed), "not billed"),
                (len(self.kept), "in the spool after all"),
                (len(self.unknown), "still unknown"),
            )
            if count
        ]
        found = "Calls of unknown outcome: " + (", ".join(parts) or "none")
        return f"{found}. {self.reason}" if self.reason else f"{found}."


async def reconcile(client: AimlApiClient, spool: Spool, *, calls: Iterable[PaidCall]) -> Reconciliation:
    """Settle calls of unknown outcome by the service's log, as far as its rows are proof.

    - A row with a cost, or a success: billed. The call stays in the spool as billed, with its credits.
    - A failed row for every time the call was sent: not billed, as the service charges no failed request. The call is
      closed.
    - Anything else stays unknown. The service logs and charges after it has answered, so neither a missing row nor a
      success without a cost proves anything; reconcile again later. The log covers the calls of one API key only.

    Repeating it is harmless: settled calls are skipped. Costs no credits, and one request per 100 log rows in the 15
    minutes around each call, at most `MAX_PAGES` requests. A log that can't be read raises nothing: the pages that were
    read count, and `reason` has the cause.

    Args:
        client: a client with the endpoint and the API key of the calls. Calls of other endpoints are skipped.
        spool: the spool that holds the calls.
        calls: the calls to settle, from `Spool.open_calls`. None of them may still be in flight, which the caller must
            ensure. Calls that are known to be billed are skipped.
    """
    candidates = {
        call.client_request_id: call
        for call in calls
        if call.billed is Billed.UNKNOWN and call.endpoint == client.base_url
    }
    kept = [name for name, call in candidates.items() if await _is_kept(call, spool)]
    rows, reason = await _look_up([call for name, call in candidates.items() if name not in kept], client)

    # Read again: a call that another process has settled meanwhile must not be written back.
    still_open = {call.client_request_id for call in spool.open_calls() if call.billed is Billed.UNKNOWN}
    billed: dict[str, float | None] = {}
    not_billed, unknown = [], []
    for name, call in candidates.items():
        if name not in still_open:
            continue
        if name in kept:
            spool.close_call(call)
            continue
        outcome = _judge(call, rows[name])
        if outcome is Billed.YES:
            billed[name] = _cost(rows[name])
            spool.leave_open(call, _billed_for(call, billed[name]))
        elif outcome is Billed.NO:
            not_billed.append(name)
            spool.close_call(call)
        else:
            unknown.append(name)
    return Reconciliation(
        billed=billed,
        not_billed=tuple(not_billed),
        kept=tuple(name for name in kept if name in still_open),
        unknown=tuple(unknown),
        reason=reason if unknown else None,
    )


async def _is_kept(call: PaidCall, spool: Spool) -> bool:
    if call.error is not None:
        return False
    # In a thread, as a record can contain a whole image.
    try:
        record = await anyio.to_thread.run_sync(spool.find_generation, call.fingerprint)
    except SpoolUnreadable:
        return False
    return record is not None and record.client_request_id == call.client_request_id


async def _look_up(
    calls: Sequence[PaidCall], client: AimlApiClient
) -> tuple[defaultdict[str, list[LogEntry]], str | None]:
    """Read the log's rows of each call. The second value is why it was not read completely, or None."""
    rows: defaultdict[str, list[LogEntry]] = defaultdict(list)
    wanted = {call.client_request_id for call in calls}
    pages = 0
    try:
        for start, end in _windows(calls):
            async for page in client.log_pages(start, end):
                for entry in page:
                    if entry.client_request_id in wanted:
                        rows[entry.client_request_id].append(entry)
                pages += 1
                if pages == MAX_PAGES:
                    return rows, f"The log was read for {MAX_PAGES * LOG_PAGE_ROWS:,} rows and no further."
    except ServiceError as error:
        return rows, f"The log could not be read: {error.message}"
    return rows, None


def _windows(calls: Sequence[PaidCall]) -> list[tuple[datetime, datetime]]:
    """Periods that contain the calls, the newest first. The time between distant calls is skipped."""
    windows: list[tuple[datetime, datetime]] = []
    for sent_at in sorted((call.sent_at for call in calls), reverse=True):
        start, end = sent_at - _MARGIN, sent_at + _MARGIN
        if windows and end >= windows[-1][0]:
            windows[-1] = (start, windows[-1][1])
        else:
            windows.append((start, end))
    return windows


def _judge(call: PaidCall, rows: Sequence[LogEntry]) -> Billed:
    outcomes = [row.billed for row in rows]
    if Billed.YES in outcomes:
        return Billed.YES
    # A call that was refused by the rate limit has a failed row under the same id, which proves nothing about the
    # later send whose answer was lost.
    return Billed.NO if outcomes.count(Billed.NO) >= call.sends and Billed.UNKNOWN not in outcomes else Billed.UNKNOWN


def _cost(rows: Sequence[LogEntry]) -> float | None:
    known = [row.credits for row in rows if row.billed is Billed.YES and row.credits is not None]
    return sum(known) if known else None


def _billed_for(call: PaidCall, cost: float | None) -> AnswerLost:
    how = call.error or "Its process ended before the answer came."
    price = "" if cost is None else f" with {describe_credits(cost)}"
    return AnswerLost(
        f"{how} The service's log shows it as billed{price}.",
        client_request_id=call.client_request_id,
        billed=Billed.YES,
        credits_used=cost,
    )
