"""Allocation of a cap to shards: never exceeded, and used up as far as rows can use it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flux_prefect.money.allocation import Allocation, ShardCost
from flux_prefect.money.ledger import Amount

PRICE = 100.0


def cost(rows: int, *, images: int = 1) -> ShardCost:
    """The cost of a shard whose rows all cost the same."""
    each = Amount(PRICE * images, images)
    return ShardCost(Amount(rows * each.credits, rows * each.images), each, each)


shards = st.lists(st.integers(1, 20), min_size=1, max_size=8)
caps = st.builds(
    Amount, st.one_of(st.just(math.inf), st.floats(0, 10_000)), st.one_of(st.just(math.inf), st.integers(0, 100))
)


@given(sizes=shards, cap=caps, data=st.data())
def test_allowances_together_never_exceed_the_cap(sizes: list[int], cap: Amount, data: st.DataObject) -> None:
    """Whichever shards report their spending, and whichever are lost and started again."""
    allocation = Allocation(cap)
    spent = Amount(0.0, 0)
    for attempt in range(3):
        for shard, rows in enumerate(sizes):
            allowance = allocation.allowance(cost(rows), len(sizes) - shard)
            if allowance is None:
                continue
            allocation.reserve((shard, attempt), allowance)
            used = data.draw(st.integers(0, int(min(rows, allowance.images, allowance.credits // PRICE))))
            spent += Amount(used * PRICE, used)
            if data.draw(st.booleans()):  # else it never reports, and may spend all of it
                allocation.settle((shard, attempt), Amount(used * PRICE, used))
        assert spent.fits(cap)
        assert sum(allocation.reserved.values(), Amount(0.0, 0)).fits(
            Amount(cap.credits + 1e-6, cap.images)
        ) or math.isinf(cap.credits)


@given(sizes=shards, cap=st.integers(0, 100))
def test_a_cap_is_used_up(sizes: list[int], cap: int) -> None:
    """Over the rounds of a batch, as many rows are paid for as a single run would pay for."""
    allocation = Allocation(Amount(cap * PRICE, cap))
    left = list(sizes)
    for attempt in range(100):
        waiting = [shard for shard, rows in enumerate(left) if rows]
        spent_in_round = 0
        for place, shard in enumerate(waiting):
            allowance = allocation.allowance(cost(sizes[shard]), len(waiting) - place)
            if allowance is None:
                continue
            used = int(min(left[shard], allowance.images, allowance.credits // PRICE))
            left[shard] -= used
            spent_in_round += used
            allocation.reserve((shard, attempt), allowance)
            allocation.settle((shard, attempt), Amount(used * PRICE, used))
        if not spent_in_round:
            break
    assert sum(sizes) - sum(left) == min(cap, sum(sizes))


def test_without_a_cap_the_allowance_is_infinite() -> None:
    """Not limited to the cost of the rows: a call whose answer was lost may be repeated."""
    allowance = Allocation(Amount(math.inf, math.inf)).allowance(cost(10), 2)
    assert allowance == Amount(math.inf, math.inf)


def test_an_allowance_for_less_than_one_row_is_none() -> None:
    """A run would end without an image."""
    assert Allocation(Amount(PRICE - 1, math.inf)).allowance(cost(10), 1) is None
    assert Allocation(Amount(math.inf, 0)).allowance(cost(10), 1) is None


def test_an_allowance_covers_at_least_the_dearest_row() -> None:
    """Otherwise four shards could each get a quarter of an image's price, and generate none."""
    assert Allocation(Amount(2 * PRICE, math.inf)).allowance(cost(10), 4) == Amount(PRICE, math.inf)


def test_unreported_allowances_stay_reserved() -> None:
    """A lost run may have spent its whole allowance."""
    allocation = Allocation(Amount(10 * PRICE, math.inf))
    allocation.reserve("lost", Amount(4 * PRICE, math.inf))
    assert allocation.available == Amount(6 * PRICE, math.inf)
    allocation.settle("lost", Amount(PRICE, 1))
    assert allocation.available == Amount(9 * PRICE, math.inf)
