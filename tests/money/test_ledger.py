"""The sums of a ledger equal the service's books, over kills, retries and lost answers."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_prefect.api.models import ImageRequest
from flux_prefect.errors import Billed, BudgetExhausted, SpoolUnwritable
from flux_prefect.host.spool import PaidCall
from flux_prefect.money.budget import Budget, Reservation
from flux_prefect.money.ledger import Amount, CallRecord, Fold, Ledger, Sums, paying_for_row, read_ledger

PRICE = 200_000
RUN = "5f0c1d7e-0000-4000-8000-000000000000"
SENT = datetime(2026, 7, 2, 3, 4, 5, tzinfo=timezone.utc)

# How a call can end: whether the service charges for it, what it says of it, and whether the images come.
ENDS = (
    "answered",
    "answered, cost 0",
    "answered, cost missing",
    "refused for the rate, then answered",
    "failed",
    "lost, billed",
    "lost, not billed",
    "unreadable",
    "killed, billed",
    "killed, not billed",
    "killed before it was sent",
)


def make_record(call: str = "fp-1", **known: Any) -> CallRecord:
    """Make a record of a call for one image."""
    return CallRecord(**{"call": call, "model": "flux", "images": 1, "price": PRICE, "sent_at": SENT, **known})


class Service:
    """The books of the service: what it has charged for each call."""

    def __init__(self) -> None:
        self.charged: dict[str, Amount] = {}

    def charge(self, call: Reservation, each: float) -> None:
        """Charge for a call."""
        self.charged[call.call] = Amount(each * call.request.num_images, call.request.num_images)

    @property
    def total(self) -> Amount:
        """All that it has charged."""
        return sum(self.charged.values(), Amount(0.0, 0))


class Run:
    """A flow run over several attempts: each has its own process, and what it knows is what the file has."""

    def __init__(self, folder: Path, cap: Amount) -> None:
        self.folder = folder
        self.cap = cap
        self.service = Service()
        self.attempt = 0
        self.in_flight: list[tuple[Reservation, str, int]] = []
        self.start()

    def start(self) -> None:
        """Start the next attempt."""
        self.attempt += 1
        self.ledger = Ledger(RUN, self.attempt, self.folder)
        self.budget = Budget(
            default_price=PRICE, max_credits=self.cap.credits, max_images=int(self.cap.images), ledger=self.ledger
        )

    async def send(self, row: int, images: int, end: str, each: int) -> None:
        """Send a call, unless the budget refuses it or has it wait."""
        with paying_for_row(row):
            admission = asyncio.ensure_future(
                self.budget.reserve(ImageRequest(prompt="a lighthouse", seed=1, num_images=images))
            )
        await asyncio.sleep(0)
        admission.cancel()
        with suppress(BudgetExhausted, asyncio.CancelledError):
            call = await admission
            if end == "killed before it was sent":
                return self.kill(torn=True)
            self.note(call)
            if end == "refused for the rate, then answered":
                call.note_refused()
                self.note(call)
            self.in_flight.append((call, end, each))
        return None

    def note(self, call: Reservation) -> None:
        """Note the call, as before it is sent."""
        call.note_sent(
            PaidCall(client_request_id=call.call, fingerprint="f", endpoint="", sent_at=SENT, task_run_id=None)
        )

    def end_one(self, chance: random.Random) -> None:
        """Let one call in flight end, or the process with it."""
        if not self.in_flight:
            return
        call, end, each = self.in_flight.pop(chance.randrange(len(self.in_flight)))
        images = call.request.num_images
        if end.startswith(("answered", "refused")):
            if "," in end and end.startswith("answered"):  # an unreported cost: the service charges the known price
                self.service.charge(call, call.price.credits / images)
                call.settle(Billed.YES, 0 if "cost 0" in end else None, delivered=True)
            else:
                self.service.charge(call, each)
                call.settle(Billed.YES, each * images, delivered=True)
        elif end == "failed":
            call.settle(Billed.NO, None)
        elif end == "unreadable":
            self.service.charge(call, each)
            call.settle(Billed.YES, each * images)
        else:
            if end.endswith(", billed"):
                self.service.charge(call, each)
            if end.startswith("lost"):
                call.settle(Billed.UNKNOWN, None)
            else:
                self.kill(torn=False)

    def kill(self, *, torn: bool) -> None:
        """End the process; the other calls in flight are charged for, and nobody hears of it."""
        for call, end, each in self.in_flight:
            if end != "failed":
                self.service.charge(call, each)
        self.in_flight.clear()
        if torn:
            with (self.folder / f"{RUN}.jsonl").open("ab") as file:
                file.write(b'{"ledger":1,"call":"fp-half-a-li')
        self.ledger.close()
        self.start()

    def read_log(self) -> None:
        """Settle what is unknown by the service's log."""
        in_flight = {call.call for call, _, _ in self.in_flight}
        for call in set(self.ledger.sums.unknown) - in_flight:
            charged = self.service.charged.get(call)
            if charged is None:
                self.ledger.settle(call, Billed.NO, None, delivered=False)
            else:
                self.ledger.settle(call, Billed.YES, charged.credits, delivered=False)


@settings(max_examples=1000, deadline=None)
@given(
    cap=st.builds(Amount, st.integers(0, 12 * PRICE), st.integers(0, 12)),
    steps=st.lists(
        st.tuples(
            st.integers(1, 5),
            st.sampled_from([1, 1, 2]),
            st.sampled_from(ENDS),
            st.integers(1, PRICE),
            st.integers(0, 3),
        ),
        max_size=20,
    ),
    seed=st.integers(0, 2**32),
)
def test_the_sums_equal_the_books_and_the_cap_holds(
    cap: Amount, steps: list[tuple[int, int, str, int, int]], seed: int
) -> None:
    """Over all attempts together, whatever is killed, lost, refused or reported without a cost."""
    chance = random.Random(seed)  # noqa: S311 - makes an order

    async def play(run: Run) -> None:
        for row, images, end, each, ends in steps:
            await run.send(row, images, end, each)
            assert run.service.total.fits(cap)
            for _ in range(ends):
                run.end_one(chance)
                assert run.service.total.fits(cap)
            if chance.random() < 0.2:
                run.read_log()
        while run.in_flight:
            run.end_one(chance)
        assert run.service.total.fits(run.ledger.sums.spent)
        run.read_log()

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), cap)
        asyncio.run(play(run))
        run.ledger.close()
        total, sums = run.service.total, run.ledger.sums
        assert total.fits(cap)
        assert (sums.billed_calls, sums.images) == (len(run.service.charged), total.images)
        assert sums.credits_used == pytest.approx(total.credits)
        assert sums.calls == sums.billed_calls + sums.unbilled_calls
        assert not sums.unknown
        assert sum(run.ledger.row(row).credits_used for row in range(1, 6)) == pytest.approx(total.credits)
        lines = list(read_ledger(Path(folder, f"{RUN}.jsonl")))
        again = Fold(chance.sample(lines, len(lines)) + lines)
        assert again.sums.fields().keys() == sums.fields().keys()
        assert sums_of(again.sums) == sums_of(sums)


def sums_of(sums: Sums) -> dict[str, Any]:
    """Return the fields of sums without the order of their calls."""
    fields = sums.fields()
    return {
        **fields,
        "credits_used": pytest.approx(fields["credits_used"]),
        "billed_and_lost": set(fields["billed_and_lost"]),
    }


@contextmanager
def opened(folder: Path, attempt: int = 1, **options: Any) -> Iterator[Ledger]:
    """Open the ledger of the run's next attempt."""
    ledger = Ledger(RUN, attempt, folder, **options)
    yield ledger
    ledger.close()


def test_a_retry_continues_with_what_was_spent(tmp_path: Path) -> None:
    """The sums, the calls of unknown cost and the highest price are those of all attempts."""
    with opened(tmp_path) as ledger:
        ledger.record_sent(make_record("fp-1", row=1))
        ledger.record(make_record("fp-1", row=1, billed=Billed.YES, credits_used=300_000, delivered=True))
        ledger.record_sent(make_record("fp-2", row=2))
    with opened(tmp_path, attempt=2) as ledger:
        assert ledger.sums.spent == Amount(300_000 + PRICE, 2)
        assert (ledger.row(1).billed_calls, list(ledger.row(2).unknown)) == (1, ["fp-2"])
        assert ledger.prices == {"flux": 300_000}
        assert Budget(default_price=PRICE, ledger=ledger).price_of(
            ImageRequest(prompt="a lighthouse", model="flux/kontext-pro/text-to-image")
        ) == Amount(PRICE, 1)


def test_a_run_counts_the_calls_of_its_parts(tmp_path: Path) -> None:
    """A record of a subrun is in the ledger of its parent as well, also after both were started again."""
    for attempt in (1, 2):
        with opened(tmp_path, attempt=attempt) as parent:
            part = Ledger(f"part-{attempt}", 1, tmp_path, within=parent)
            part.record_sent(make_record(f"fp-{attempt}", row=1))
            part.settle(f"fp-{attempt}", Billed.YES, 168_000, delivered=True)
            assert part.sums.spent == Amount(168_000, 1)
            assert parent.sums.spent == Amount(attempt * 168_000, attempt)
            assert parent.row(1) == Sums()


def test_a_call_id_says_whose_call_it_is() -> None:
    """The service's log can be searched for the calls of a run."""
    assert Ledger(RUN).new_call_id().startswith("fp-5f0c1d7e000040008000000000000000.")
    assert Ledger(RUN).new_call_id() != Ledger(RUN).new_call_id()


def test_nothing_is_sent_where_the_ledger_cannot_be_written() -> None:
    """The error names the file and the setting."""
    with pytest.raises(SpoolUnwritable, match="FLUX_PREFECT_SPOOL"):
        Ledger(RUN, 1, Path("/proc/flux"))
