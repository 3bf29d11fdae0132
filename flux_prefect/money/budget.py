"""Hard cap on the spending of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import anyio

from flux_prefect.api.models import CREDITS_PER_USD, ImageRequest
from flux_prefect.errors import Billed, BudgetExhausted, RunStopped

__all__ = ["Amount", "Budget", "Reservation", "current_budget", "describe_credits", "spending_from"]


class Budget:
    """The caps of a run, what it has spent, and what its calls in flight may still cost.

    Guarantee: as long as no image costs more than its price here, all admitted calls together never cost more than the
    caps, however they end. A call that may have been billed counts as billed. An image that costs more than its price
    raises the price for all later calls; nothing lowers it.

    For one event loop.

    Args:
        prices: the most credits that an image costs, by model.
        default_price: the price of an image of any other model, in credits.
        max_credits: the cap in credits, or None.
        max_images: the cap in paid images, or None.

    Attributes:
        cap: both caps together; infinite if there is none.
        spent: what calls of this run cost, or may have cost.
        observed: the most credits that an image cost in this run, by model.

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
    ) -> None:
        self.max_credits = max_credits
        self.max_images = max_images
        self.spent = Amount(0.0, 0)
        self.observed: dict[str, float] = {}
        self._prices = dict(prices or {})
        self._default_price = default_price
        self.cap = Amount(
            math.inf if max_credits is None else max_credits, math.inf if max_images is None else max_images
        )
        self._open: set[Reservation] = set()
        self._closed: str | None = None
        self._settled = anyio.Event()

    def price_of(self, request: ImageRequest) -> Amount:
        """Return the most that a request's images cost."""
        price = max(self._prices.get(request.model, self._default_price), self.observed.get(request.model, 0.0))
        return Amount(price * request.num_images, request.num_images)

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
            if not (self.spent + price).fits(self.cap):
                raise BudgetExhausted(
                    f"Not sent: {price} would exceed the cap of {self.cap}, as {self.spent} are spent. "
                    "Raise max_credits or max_images, or run again later: what is published by then costs nothing."
                )
            # Summed from scratch each time: an accumulated rounding error could make a call wait for ever.
            reserved = sum((other.price for other in self._open), Amount(0.0, 0))
            if not self._open or (self.spent + reserved + price).fits(self.cap):
                reservation = Reservation(self, request, price)
                self._open.add(reservation)
                return reservation
            await self._settled.wait()

    def _settle(self, reservation: Reservation, billed: Billed, credits_used: float | None) -> None:
        self._open.remove(reservation)
        request = reservation.request
        if billed is Billed.YES and credits_used is not None:
            self.spent += Amount(credits_used, request.num_images)
            each = credits_used / request.num_images
            self.observed[request.model] = max(each, self.observed.get(request.model, 0.0))
        elif billed is not Billed.NO:
            self.spent += reservation.price
        self._wake()

    def _wake(self) -> None:
        settled, self._settled = self._settled, anyio.Event()
        settled.set()


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


@dataclass(frozen=True, eq=False)
class Reservation:
    """The amount reserved for one call."""

    budget: Budget
    request: ImageRequest
    price: Amount

    def settle(self, billed: Billed, credits_used: float | None) -> None:
        """Settle the reservation by the call's outcome. Call it once."""
        self.budget._settle(self, billed, credits_used)  # noqa: SLF001 - a reservation belongs to its budget


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
