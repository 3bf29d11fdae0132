"""A hard cap on what a run spends."""

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
    """What may be spent, what is spent, and what calls in flight may still cost.

    Guarantee: as long as no image costs more than its price here, the calls admitted never cost more than the caps
    together, whatever becomes of them. A call that may have been billed counts as billed. An image that costs more
    than its price raises it for all calls after; nothing lowers it.

    For one event loop.

    Args:
        prices: the most credits that an image of a model costs.
        default_price: of a model that `prices` does not name.
        max_credits: the cap, in credits; None for none.
        max_images: the cap, in images that are paid for; None for none.

    Attributes:
        cap: both caps together, infinite where there is none.
        spent: what calls of this run cost, or may have cost.
        observed: the most credits that an image of each model did cost in this run.

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
        """The most that a request's images cost."""
        price = max(self._prices.get(request.model, self._default_price), self.observed.get(request.model, 0.0))
        return Amount(price * request.num_images, request.num_images)

    def has_room(self, request: ImageRequest) -> bool:
        """Whether the request would fit if no other call were in flight."""
        return (self.spent + self.price_of(request)).fits(self.cap)

    def close(self, reason: str) -> None:
        """Admit no call any more; who is waiting to be admitted is told so. Calls in flight are settled as ever."""
        self._closed = reason
        self._wake()

    def check_open(self) -> None:
        """For the last moment before a call goes out.

        Raises:
            RunStopped: the budget was closed.
        """
        if self._closed is not None:
            raise RunStopped(f"Not sent: {self._closed}. Run again: what is published by then costs nothing.")

    async def reserve(self, request: ImageRequest) -> Reservation:
        """Set the request's price aside, waiting for calls in flight while their money may come back.

        Raises:
            BudgetExhausted: it does not fit beside what is spent for certain.
            RunStopped: the budget was closed.
        """
        while True:
            self.check_open()
            price = self.price_of(request)
            if not (self.spent + price).fits(self.cap):
                raise BudgetExhausted(
                    f"Not sent: {price} would pass the cap of {self.cap}, as {self.spent} are spent. "
                    "Raise max_credits or max_images, or run again later: what is published by then costs nothing."
                )
            # Added up anew each time: a rounding error that stayed would make somebody wait for ever.
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
    """Money and images, added up together."""

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
        """Whether neither is over the cap."""
        return self.credits <= cap.credits and self.images <= cap.images


@dataclass(frozen=True, eq=False)
class Reservation:
    """The money set aside for one call."""

    budget: Budget
    request: ImageRequest
    price: Amount

    def settle(self, billed: Billed, credits_used: float | None) -> None:
        """Book how the call ended. To be called once."""
        self.budget._settle(self, billed, credits_used)  # noqa: SLF001 - the two halves of one thing


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def spending_from(budget: Budget) -> Iterator[None]:
    """Let every paid call inside the block, in this context, be reserved under the budget first.

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
    """The budget of the enclosing `spending_from`, if any."""
    return _budget.get()


def describe_credits(credits_used: float) -> str:
    """Credits with their worth in US dollars, for people."""
    return f"{credits_used:,.0f} credits (${credits_used / CREDITS_PER_USD:,.2f})"
