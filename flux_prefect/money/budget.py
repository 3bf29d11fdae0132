"""Hard cap on the spending of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import anyio

from flux_prefect.api.models import CREDITS_PER_USD, ImageRequest
from flux_prefect.errors import Billed, BudgetExhausted, RunStopped
from flux_prefect.host.spool import PaidCall
from flux_prefect.money.ledger import Amount, CallRecord, Ledger, current_row

__all__ = ["Budget", "Reservation", "current_budget", "describe_credits", "spending_from"]


class Budget:
    """The caps of a run, what it has spent, and what its calls in flight may still cost.

    Guarantee: as long as no image costs more than its price here, all admitted calls together never cost more than the
    caps, however they end. A call that may have been billed counts as billed. An image that costs more than its price
    raises the price for all later calls; nothing lowers it. A billed image that is reported to cost nothing counts at
    its price.

    For one event loop.

    Args:
        prices: the most credits that an image costs, by model.
        default_price: the price of an image of any other model, in credits.
        max_credits: the cap in credits, or None.
        max_images: the cap in paid images, or None.
        ledger: the run's ledger. What it has of earlier attempts counts under the caps. A new one in memory if None.

    Attributes:
        cap: both caps together; infinite if there is none.
        ledger: has every call that was admitted and sent.

    Example:
        ```python
        budget = Budget(default_price=200_000, max_credits=1_000_000)
        with spending_from(budget):
            await generate_image(request, credentials)
        print(budget.spent)
        ```
    """

    def __init__(
        self,
        *,
        prices: Mapping[str, float] | None = None,
        default_price: float,
        max_credits: float | None = None,
        max_images: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.max_credits = max_credits
        self.max_images = max_images
        self.ledger = Ledger() if ledger is None else ledger
        self._prices = dict(prices or {})
        self._default_price = default_price
        self.cap = Amount(
            math.inf if max_credits is None else max_credits, math.inf if max_images is None else max_images
        )
        self._open: set[Reservation] = set()
        self._closed: str | None = None
        self._settled = anyio.Event()

    @property
    def spent(self) -> Amount:
        """What the calls of this run cost, or may have cost, over all its attempts. Without those in flight."""
        sums, in_flight = self.ledger.sums, {reservation.call for reservation in self._open}
        unknown = (call.counted for name, call in sums.unknown.items() if name not in in_flight)
        return sum(unknown, Amount(sums.credits_used, sums.images))

    @property
    def observed(self) -> dict[str, float]:
        """The most credits that an image cost in this run, by model."""
        return self.ledger.prices

    @property
    def prices(self) -> dict[str, float]:
        """The most credits that an image is known to cost, by model."""
        return dict(self._prices)

    def quote(self, model: str, credits_an_image: float) -> None:
        """Note the service's own price. The larger counts, where this host has paid another one."""
        self._prices[model] = max(credits_an_image, self._prices.get(model, 0.0))

    def price_of(self, request: ImageRequest) -> Amount:
        """Return the most that a request's images cost."""
        return Amount(self.image_price(request.model) * request.num_images, request.num_images)

    def image_price(self, model: str) -> float:
        """Return the most credits that an image of a model costs."""
        return max(self._prices.get(model, self._default_price), self.observed.get(model, 0.0))

    def has_room(self, request: ImageRequest) -> bool:
        """Whether the request would fit if no other call were in flight."""
        return (self.spent + self.price_of(request)).fits(self.cap)

    def close(self, reason: str) -> None:
        """Refuse all further calls, including those that wait to be admitted. Calls in flight are settled as usual."""
        self._closed = reason
        self._wake()

    def check_open(self) -> None:
        """Verify that calls may still be sent. Call it directly before sending one.

        Raises:
            RunStopped: the budget was closed.
        """
        if self._closed is not None:
            raise RunStopped(f"Not sent: {self._closed}. Run again: what is published by then costs nothing.")

    async def reserve(self, request: ImageRequest) -> Reservation:
        """Reserve the request's price. Waits while calls in flight may still release enough.

        Raises:
            BudgetExhausted: the price does not fit beside what is spent for certain.
            RunStopped: the budget was closed.
        """
        while True:
            self.check_open()
            price = self.price_of(request)
            spent = self.spent
            if not (spent + price).fits(self.cap):
                raise BudgetExhausted(
                    f"Not sent: {price} would exceed the cap of {self.cap}, as {spent} are spent. "
                    "Raise max_credits or max_images, or run again later: what is published by then costs nothing."
                )
            # Summed from scratch each time: an accumulated rounding error could make a call wait for ever.
            reserved = sum((other.price for other in self._open), Amount(0.0, 0))
            if not self._open or (spent + reserved + price).fits(self.cap):
                reservation = Reservation(self, request, price, self.ledger.new_call_id(), current_row())
                self._open.add(reservation)
                return reservation
            await self._settled.wait()

    def _release(self, reservation: Reservation) -> None:
        self._open.remove(reservation)
        self._wake()

    def _wake(self) -> None:
        settled, self._settled = self._settled, anyio.Event()
        settled.set()


@dataclass(eq=False)
class Reservation:
    """The amount reserved for one call, and the call's entries in the ledger.

    Attributes:
        budget: the budget that it belongs to.
        request: what the call asks for.
        price: the most that it costs.
        call: our id of the call.
        row: the row of the table that it is made for, or None.
    """

    budget: Budget
    request: ImageRequest
    price: Amount
    call: str
    row: int | None
    _record: CallRecord | None = field(default=None, repr=False)
    _announced: CallRecord | None = field(default=None, repr=False)

    async def announce(self, call: PaidCall) -> None:
        """Note the call where other hosts find it, each time before it is sent.

        Raises:
            BucketError: so it must not be sent.
        """
        self._announced = self._described(fingerprint=call.fingerprint, endpoint=call.endpoint, sent_at=call.sent_at)
        await self.budget.ledger.announce(self._announced)

    def note_sent(self, call: PaidCall) -> None:
        """Note in the ledger that the call is sent now. Call it directly before each time that it is.

        Raises:
            SpoolUnwritable: so it must not be sent.
        """
        record = self._described(fingerprint=call.fingerprint, endpoint=call.endpoint, sent_at=call.sent_at)
        self.budget.ledger.record_sent(record)
        self._record, self._announced = record, None

    def note_refused(self) -> None:
        """Note that the service refused the call, which costs nothing. It may be sent again."""
        if self._record is not None:
            self.budget.ledger.record(self._record.model_copy(update={"billed": Billed.NO}))

    def settle(self, billed: Billed, credits_used: float | None, *, delivered: bool = False) -> None:
        """Settle the reservation by the call's outcome. Call it once.

        Args:
            billed: what is known of the call's cost.
            credits_used: its cost as reported, in credits, or None.
            delivered: whether its answer came, with images.
        """
        record = self._record
        if record is None and billed is not Billed.NO:
            record = self._described(sent_at=datetime.now(timezone.utc))
        if record is not None:
            outcome = {"billed": billed, "credits_used": credits_used, "delivered": delivered}
            self.budget.ledger.record(record.model_copy(update=outcome))
        if self._announced is not None:
            update = {"billed": Billed.NO, "withdrawn": record is None}
            self.budget.ledger.withdraw(self._announced.model_copy(update=update))
        self.budget._release(self)  # noqa: SLF001 - a reservation belongs to its budget

    def _described(self, **known: Any) -> CallRecord:
        return CallRecord(
            call=self.call,
            attempt=self.budget.ledger.attempt,
            row=self.row,
            model=self.request.model,
            images=self.request.num_images,
            price=self.price.credits,
            sends=1 if self._record is None else self._record.sends + 1,
            **known,
        )


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def spending_from(budget: Budget) -> Iterator[None]:
    """Reserve every paid call of this context under the budget inside the block.

    Example:
        ```python
        with spending_from(Budget(default_price=200_000, max_images=1)):
            await generate_image(request, credentials)
        ```
    """
    token = _budget.set(budget)
    try:
        yield
    finally:
        _budget.reset(token)


def current_budget() -> Budget | None:
    """Return the budget of the enclosing `spending_from`, or None."""
    return _budget.get()


def describe_credits(credits_used: float) -> str:
    """Format credits with their value in US dollars."""
    return f"{credits_used:,.0f} credits (${credits_used / CREDITS_PER_USD:,.2f})"
