"""A cap among shards: never passed, whatever they do, and used up as far as rows can use it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flux_prefect.money.allocation import Allocation, ShardCost
from flux_prefect.money.budget import Amount

PRICE = 100.0


def cost(rows: int, *, images: int = 1) -> ShardCost:
    """Of rows that are all alike."""
    each = Amount(PRICE * images, images)
    return ShardCost(Amount(rows * each.credits, rows * each.images), each, each)


shards = st.lists(st.integers(1, 20), min_size=1, max_size=8)
caps = st.builds(
    Amount, st.one_of(st.just(math.inf), st.floats(0, 10_000)), st.one_of(st.just(math.inf), st.integers(0, 100))
)


@given(sizes=shards, cap=caps, data=st.data())
def test_shares_together_never_pass_the_cap(sizes: list[int], cap: Amount, data: st.DataObject) -> None:
    """Whichever shards tell of their ends, and whichever are lost and started again."""
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
            if data.draw(st.booleans()):  # else it never tells, and may spend all of it
                allocation.settle((shard, attempt), Amount(used * PRICE, used))
        assert spent.fits(cap)
        assert sum(allocation.reserved.values(), Amount(0.0, 0)).fits(
            Amount(cap.credits + 1e-6, cap.images)
        ) or math.isinf(cap.credits)


@given(sizes=shards, cap=st.integers(0, 100))
def test_a_cap_is_used_up(sizes: list[int], cap: int) -> None:
    """In rounds, as the batch goes through them, as many rows are paid for as one run alone would pay for."""
    allocation = Allocation(Amount(cap * PRICE, cap))
    left = list(sizes)
    for attempt in range(100):
        waiting = [shard for shard, rows in enumerate(left) if rows]
        given_out = 0
        for place, shard in enumerate(waiting):
            allowance = allocation.allowance(cost(sizes[shard]), len(waiting) - place)
            if allowance is None:
                continue
            used = int(min(left[shard], allowance.images, allowance.credits // PRICE))
            left[shard] -= used
            given_out += used
            allocation.reserve((shard, attempt), allowance)
            allocation.settle((shard, attempt), Amount(used * PRICE, used))
        if not given_out:
            break
    assert sum(sizes) - sum(left) == min(cap, sum(sizes))


def test_a_shard_gets_no_cap_where_the_batch_has_none() -> None:
    """Not even what its rows cost: a lost answer may be repeated."""
    allowance = Allocation(Amount(math.inf, math.inf)).allowance(cost(10), 2)
    assert allowance == Amount(math.inf, math.inf)


def test_a_share_that_pays_for_nothing_is_none() -> None:
    """A run would only find that out."""
    assert Allocation(Amount(PRICE - 1, math.inf)).allowance(cost(10), 1) is None
    assert Allocation(Amount(math.inf, 0)).allowance(cost(10), 1) is None


def test_an_even_part_is_at_least_the_dearest_row() -> None:
    """Else four shards would each get a quarter of an image, and make none."""
    assert Allocation(Amount(2 * PRICE, math.inf)).allowance(cost(10), 4) == Amount(PRICE, math.inf)


def test_what_nobody_has_told_of_stays_given() -> None:
    """A lost run may have spent all of its allowance."""
    allocation = Allocation(Amount(10 * PRICE, math.inf))
    allocation.reserve("lost", Amount(4 * PRICE, math.inf))
    assert allocation.available == Amount(6 * PRICE, math.inf)
    allocation.settle("lost", Amount(PRICE, 1))
    assert allocation.available == Amount(9 * PRICE, math.inf)
