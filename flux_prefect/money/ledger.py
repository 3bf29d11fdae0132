"""The ledger of a run: every paid call, from before it is sent until its cost is known.

<spool>/ledgers/<run>.jsonl    on the host: one line each time that something became known of a call, only ever appended

Every sum of a run is a fold over these lines (`Fold`), whatever their order and however often one is repeated. So a
flow run that is retried continues its own ledger: its cap, its report and its manifest cover all its attempts.

A line is in the file before its call is sent, and survives a kill of the process. It is not flushed to the disk: a
power cut can lose the last seconds.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux_prefect.errors import Billed, SpoolUnreadable, SpoolUnwritable
from flux_prefect.local_files import explain_os_error

__all__ = ["Amount", "CallRecord", "Fold", "Ledger", "Sums", "current_row", "encode_record", "paying_for_row"]

VERSION = 1
"""The version of the format, in each line under `ledger`."""


@dataclass(frozen=True)
class Amount:
    """An amount of credits and images."""

    credits: float
    images: float

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.credits + other.credits, self.images + other.images)

    def __str__(self) -> str:
        parts = [
            *([f"{self.credits:,.0f} credits"] if math.isfinite(self.credits) else []),
            *([f"{self.images:.0f} image{'' if self.images == 1 else 's'}"] if math.isfinite(self.images) else []),
        ]
        return " and ".join(parts)

    def fits(self, cap: Amount) -> bool:
        """Whether neither exceeds the cap."""
        return self.credits <= cap.credits and self.images <= cap.images


class CallRecord(BaseModel):
    """What is known of one paid call."""

    model_config = ConfigDict(frozen=True)

    call: str = Field(description="Our id of the call, as the service's log shows it.")
    attempt: int = Field(default=1, description="The attempt of the flow run that sent it, from 1.")
    row: int | None = Field(default=None, description="The row of the table that it was sent for.")
    fingerprint: str = Field(default="", description="What was asked for.")
    endpoint: str = Field(default="", description="The root URL of the service.")
    model: str = Field(description="The model.")
    images: int = Field(description="The images that were asked for.")
    price: float = Field(description="The most that the call was expected to cost, in credits.")
    sent_at: datetime = Field(description="When it was last sent, UTC.")
    sends: int = Field(default=1, description="How often it was sent. Each time but the last, the service refused it.")
    billed: Billed = Field(default=Billed.UNKNOWN, description="What is known of its cost.")
    credits_used: float | None = Field(default=None, description="Its cost as reported, in credits. None: unknown.")
    delivered: bool = Field(default=False, description="Whether its answer is here, with images.")
    withdrawn: bool = Field(default=False, description="Whether it was noted for other hosts, and then not sent.")

    @property
    def is_priced(self) -> bool:
        """Whether a cost was reported. A cost of 0 for what was billed is no price."""
        return bool(self.credits_used)

    @property
    def cost(self) -> float:
        """What it cost for certain, in credits: as reported, else the known price. 0 while that is unknown."""
        if self.billed is not Billed.YES:
            return 0.0
        return self.credits_used or self.price

    @property
    def counted(self) -> Amount:
        """What it counts as under a cap: a call that may have been billed counts as billed."""
        if self.billed is Billed.NO:
            return Amount(0.0, 0)
        return Amount(self.cost if self.billed is Billed.YES else self.price, self.images)

    def merge(self, other: CallRecord) -> CallRecord:
        """Combine two records of this call, in any order, to what both know."""
        first, second = sorted((self, other), key=lambda each: (each.sends, each.billed is not Billed.UNKNOWN))
        if Billed.YES not in {first.billed, second.billed}:
            return second  # a later send counts, or what is known of the same one
        yes = second if second.billed is Billed.YES else first
        costs = [each.credits_used for each in (first, second) if each.billed is Billed.YES and each.credits_used]
        return yes.model_copy(
            update={
                "credits_used": max(costs, default=yes.credits_used),
                "delivered": first.delivered or second.delivered,
            }
        )


@dataclass(slots=True)
class Sums:
    """The sums over some calls.

    Attributes:
        calls: all of them.
        billed_calls: those that were billed for certain.
        unbilled_calls: those that cost nothing for certain.
        unpriced_calls: billed calls without a reported cost, which count at their known price.
        credits_used: what the billed calls cost, in credits.
        reported_credits: the costs that were reported for them, in credits.
        images: the images of the billed calls.
        unknown: the calls of which it is not known whether they were billed, by id.
        lost: the billed calls that delivered nothing, by id.
    """

    calls: int = 0
    billed_calls: int = 0
    unbilled_calls: int = 0
    unpriced_calls: int = 0
    credits_used: float = 0.0
    reported_credits: float = 0.0
    images: int = 0
    unknown: dict[str, CallRecord] = field(default_factory=dict)
    lost: dict[str, CallRecord] = field(default_factory=dict)

    @property
    def spent(self) -> Amount:
        """What counts under a cap: all that was billed, or may have been."""
        # Unknown calls are few, and summed from scratch, so that rounding errors don't accumulate.
        return sum((call.counted for call in self.unknown.values()), Amount(self.credits_used, self.images))

    def count(self, call: CallRecord, sign: int = 1) -> None:
        """Add a call, or with a negative sign take it out again."""
        if call.withdrawn:
            return
        self.calls += sign
        if call.billed is Billed.YES:
            self.billed_calls += sign
            self.unpriced_calls += sign * (not call.is_priced)
            self.credits_used += sign * call.cost
            self.reported_credits += sign * (call.credits_used or 0.0)
            self.images += sign * call.images
        elif call.billed is Billed.NO:
            self.unbilled_calls += sign
        for found, calls in (
            (call.billed is Billed.UNKNOWN, self.unknown),
            (call.billed is Billed.YES and not call.delivered, self.lost),
        ):
            if found and sign > 0:
                calls[call.call] = call
            else:
                calls.pop(call.call, None)

    def fields(self) -> dict[str, Any]:
        """Return the fields that records and reports have of them."""
        return {
            "calls": self.calls,
            "billed_calls": self.billed_calls,
            "unbilled_calls": self.unbilled_calls,
            "unpriced_calls": self.unpriced_calls,
            "credits_used": self.credits_used,
            "billed_and_lost": tuple(self.lost),
            "possibly_billed": tuple(self.unknown),
        }


class Fold:
    """The sums over a ledger, of all its calls and of each row.

    Records may come in any order and repeatedly: those of one call are merged. Memory: about 120 bytes a call and as
    much again a row, and a whole record for each call that has not delivered.

    Attributes:
        sums: over all calls.
        rows: over the calls of each row.
        prices: the most credits that an image was reported to cost, by model.
    """

    def __init__(self, records: Iterable[CallRecord] = ()) -> None:
        self.sums = Sums()
        self.rows: dict[int, Sums] = {}
        self.prices: dict[str, float] = {}
        self._delivered: set[str] = set()
        self._others: dict[str, CallRecord] = {}
        for record in records:
            self.add(record)

    def find(self, call: str) -> CallRecord | None:
        """Return what is known of a call; None for one that is not in the ledger, or has delivered."""
        return self._others.get(call)

    def __contains__(self, call: object) -> bool:
        """Whether a call of this id is in the ledger."""
        return call in self._delivered or call in self._others

    def add(self, record: CallRecord) -> None:
        """Add one record."""
        if record.call in self._delivered:
            return
        before = self._others.pop(record.call, None)
        if before is not None:
            self._count(before, -1)
            record = before.merge(record)
        self._count(record, 1)
        if record.billed is Billed.YES and record.delivered:
            self._delivered.add(record.call)
        else:
            self._others[record.call] = record
        if record.billed is Billed.YES and record.credits_used:
            each = record.credits_used / record.images
            self.prices[record.model] = max(each, self.prices.get(record.model, 0.0))

    def _count(self, record: CallRecord, sign: int) -> None:
        self.sums.count(record, sign)
        if record.row is not None:
            self.rows.setdefault(record.row, Sums()).count(record, sign)


class Copy(Protocol):
    """Another place of a ledger, which outlives this host."""

    def add(self, record: CallRecord) -> None:
        """Add a record. It is there after the next flush."""

    async def flush(self) -> None:
        """Write what was added.

        Raises:
            BucketError: it is not there.
        """


class Ledger:
    """The ledger of one flow run on this host, over all its attempts.

    For one event loop. Without a folder it is kept in memory alone.

    Args:
        run: the flow run's id.
        attempt: the number of this attempt, from 1.
        folder: where its file is, or will be.
        within: the ledger of the run that this one is a part of. It gets every record as well, without its row.

    Attributes:
        run: the flow run's id.
        attempt: the number of this attempt.
        is_continued: whether it has calls of earlier attempts.

    Raises:
        SpoolUnreadable: the file is there and can't be read.
        SpoolUnwritable: the file can't be written.
    """

    def __init__(
        self, run: str = "", attempt: int = 1, folder: Path | None = None, *, within: Ledger | None = None
    ) -> None:
        self.run = run
        self.attempt = attempt
        self._within = within
        self._path = None if folder is None else folder / f"{run}.jsonl"
        self._fold = Fold() if self._path is None else Fold(read_ledger(self._path))
        self.is_continued = self._fold.sums.calls > 0
        self._copy: Copy | None = None
        self._file: int | None = None
        self._torn = False
        if self._path is not None:
            try:
                self._file = _open(self._path)
            except OSError as error:
                raise _unwritable(self._path, error) from error

    def __contains__(self, call: object) -> bool:
        """Whether a call of this id is in the ledger."""
        return call in self._fold

    @property
    def sums(self) -> Sums:
        """The sums over all calls of all attempts."""
        return self._fold.sums

    @property
    def prices(self) -> dict[str, float]:
        """The most credits that an image was reported to cost, by model."""
        return self._fold.prices

    def new_call_id(self) -> str:
        """Make the id of a call: with the run's own id, by which the service's log shows whose it is."""
        run = self.run.replace("-", "")
        return f"fp-{run}.{uuid4().hex[:16]}" if run else f"fp-{uuid4().hex}"

    def row(self, number: int) -> Sums:
        """Return the sums over the calls of one row."""
        return self._fold.rows.get(number, Sums())

    def continue_from(self, records: Iterable[CallRecord], copy: Copy) -> list[CallRecord]:
        """Add what other hosts noted, and note all that follows in the copy as well.

        Returns:
            The calls of other hosts without an answer: perhaps billed, or billed and lost.
        """
        others: dict[str, None] = {}
        for record in records:
            if record.call in others or record.call not in self._fold:
                others[record.call] = None
            self._fold.add(record)
        self.is_continued = self._fold.sums.calls > 0
        self._copy = copy
        known = (self._fold.find(call) for call in others)
        return [call for call in known if call is not None and call.billed is not Billed.NO]

    async def announce(self, record: CallRecord) -> None:
        """Note a call in the copy before it is noted here and sent. Withdraw it if it is then not sent.

        Raises:
            BucketError: so it must not be sent.
        """
        if self._copy is not None:
            self._copy.add(record)
            await self._copy.flush()
        if self._within is not None:
            await self._within.announce(self._within.own(record))

    def withdraw(self, record: CallRecord) -> None:
        """Take the announcement of a call back that was not sent."""
        if self._copy is not None:
            self._copy.add(record)
        if self._within is not None:
            self._within.withdraw(self._within.own(record))

    def own(self, record: CallRecord) -> CallRecord:
        """Return the record of a part's call as this ledger has it."""
        return record.model_copy(update={"row": None, "attempt": self.attempt})

    def record_sent(self, record: CallRecord) -> None:
        """Note a call before it is sent.

        Raises:
            SpoolUnwritable: so it must not be sent.
        """
        try:
            self._append(record)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._count(record)

    def record(self, record: CallRecord) -> None:
        """Note what became known of a call. A full disk is ignored: the call then stays noted as perhaps billed."""
        with suppress(OSError):
            self._append(record)
        self._count(record)

    def settle(self, call: str, billed: Billed, credits_used: float | None, *, delivered: bool) -> bool:
        """Note what was found out about a call later. Returns False if the call needs no settling, or is not here."""
        known = self._fold.find(call)
        if known is None and self._within is not None:  # a call of an earlier part
            return self._within.settle(call, billed, credits_used, delivered=delivered)
        if known is None or (known.billed is not Billed.UNKNOWN and not delivered):
            return False
        update = {"billed": billed, "credits_used": credits_used, "delivered": delivered}
        self.record(known.model_copy(update=update))
        return True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _count(self, record: CallRecord) -> None:
        self._fold.add(record)
        if self._copy is not None:
            self._copy.add(record)
        if self._within is not None:
            self._within.record(self._within.own(record))

    def _append(self, record: CallRecord) -> None:
        if self._file is None:
            return
        line = encode_record(record)
        if self._torn:
            line = b"\n" + line
        self._torn = os.write(self._file, line) < len(line)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_ledger(path: Path) -> Iterator[CallRecord]:
    """Read the records of a ledger's file. Lines that are cut off, or of a later version, are left out.

    Raises:
        SpoolUnreadable: the file is there and can't be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                with suppress(ValidationError):
                    yield CallRecord.model_validate_json(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SpoolUnreadable(
            f"The ledger {path} can't be read {explain_os_error(error, 'make it readable for this user')}, then run "
            "again. It has what this run has spent, so nothing was sent."
        ) from error


_row: ContextVar[int | None] = ContextVar("row", default=None)


@contextmanager
def paying_for_row(number: int) -> Iterator[None]:
    """Note every paid call of this context as the row's inside the block."""
    token = _row.set(number)
    try:
        yield
    finally:
        _row.reset(token)


def current_row() -> int | None:
    """Return the row of the enclosing `paying_for_row`, or None."""
    return _row.get()


def encode_record(record: CallRecord) -> bytes:
    """Encode a record as a line of a ledger."""
    return b'{"ledger":%d,%s\n' % (VERSION, record.model_dump_json()[1:].encode(errors="replace"))


def _open(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Appended in one write each, so that the processes of two attempts can share the file.
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":  # a process was killed, or the disk was full, in a line
        os.write(file, b"\n")
    return file


def _unwritable(path: Path | None, error: OSError) -> SpoolUnwritable:
    return SpoolUnwritable(
        f"The ledger {path} can't be written "
        f"{explain_os_error(error, 'set FLUX_PREFECT_SPOOL to a folder with room for the images')}, then run again."
    )
