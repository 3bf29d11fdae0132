"""The hard cap is never exceeded, whatever calls cost and however they end."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_prefect.api.models import ImageRequest
from flux_prefect.errors import Billed, BudgetExhausted, RunStopped
from flux_prefect.money.budget import Budget, Reservation
from flux_prefect.money.ledger import Amount

PRICE = 200_000


def make_request(images: int = 1) -> ImageRequest:
    """Make a request for a number of images."""
    return ImageRequest(prompt="a lighthouse", seed=1, num_images=images)


@settings(max_examples=1000, deadline=None)
@given(
    cap=st.integers(0, 12 * PRICE),
    max_images=st.one_of(st.none(), st.integers(0, 12)),
    calls=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(list(Billed)), st.one_of(st.none(), st.integers(0, PRICE))),
        max_size=20,
    ),
    seed=st.integers(0, 2**32),
)
def test_the_billed_total_never_exceeds_the_cap(
    cap: int, max_images: int | None, calls: list[tuple[int, Billed, int | None]], seed: int
) -> None:
    """With random prices, failures and orders of completion, many calls at once, and all unknown outcomes billed."""
    chance = random.Random(seed)  # noqa: S311 - makes an order
    budget = Budget(default_price=PRICE, max_credits=cap, max_images=max_images)
    truly_billed = Amount(0, 0)

    async def call(images: int, billed: Billed, each: int | None) -> None:
        nonlocal truly_billed
        try:
            reservation = await budget.reserve(make_request(images))
        except BudgetExhausted:
            return
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if billed is not Billed.NO:
            truly_billed += Amount((PRICE if each is None else each) * images, images)
        reservation.settle(billed, None if each is None or billed is not Billed.YES else each * images)
        assert truly_billed.credits <= cap
        assert max_images is None or truly_billed.images <= max_images

    async def run() -> None:
        await asyncio.wait_for(asyncio.gather(*(call(*each) for each in calls)), timeout=10)

    asyncio.run(run())
    assert budget.spent.credits >= truly_billed.credits


async def test_a_waiting_call_uses_what_is_released() -> None:
    """A call in flight that is not billed makes room; the next call waits instead of failing."""
    budget = Budget(default_price=PRICE, max_credits=PRICE)
    first = await budget.reserve(make_request())
    second = asyncio.create_task(budget.reserve(make_request()))
    await asyncio.sleep(0)
    assert not second.done()

    first.settle(Billed.NO, None)
    assert isinstance(await second, Reservation)


async def test_a_call_that_exceeds_the_cap_is_refused() -> None:
    """The message has the sums and the caps."""
    budget = Budget(default_price=PRICE, max_credits=300_000, max_images=5)
    (await budget.reserve(make_request())).settle(Billed.YES, 168_000)

    with pytest.raises(BudgetExhausted) as caught:
        await budget.reserve(make_request())
    assert "200,000 credits and 1 image would exceed the cap of 300,000 credits and 5 images" in str(caught.value)
    assert "168,000 credits and 1 image are spent" in str(caught.value)
    assert not budget.has_room(make_request())


async def test_a_higher_price_than_expected_applies_to_later_calls() -> None:
    """Only that one call may exceed the cap."""
    budget = Budget(default_price=100, max_credits=1_000)
    (await budget.reserve(make_request())).settle(Billed.YES, 700)

    assert budget.price_of(make_request(2)) == Amount(1_400, 2)
    assert budget.observed == {make_request().model: 700}
    with pytest.raises(BudgetExhausted):
        await budget.reserve(make_request())


async def test_without_caps_everything_fits() -> None:
    """Without caps, every request is admitted."""
    budget = Budget(default_price=PRICE)
    for _ in range(100):
        await budget.reserve(make_request(4))


async def test_a_closed_budget_admits_no_call() -> None:
    """Waiting calls, new calls and the check directly before sending all raise with the reason."""
    budget = Budget(default_price=PRICE, max_credits=PRICE)
    budget.check_open()
    first = await budget.reserve(make_request())
    waiting = asyncio.create_task(budget.reserve(make_request()))
    await asyncio.sleep(0)
    budget.close("the run was cancelled")

    for admission in (waiting, budget.reserve(make_request())):
        with pytest.raises(RunStopped, match="Not sent: the run was cancelled"):
            await asyncio.wait_for(admission, timeout=5)
    with pytest.raises(RunStopped):
        budget.check_open()

    first.settle(Billed.YES, 168_000)
    assert budget.spent == Amount(168_000, 1)
