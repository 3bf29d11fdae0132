"""Allocation of a batch's cap to its shards, so that all of them together never exceed it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from flux_prefect.money.ledger import Amount

__all__ = ["Allocation", "ShardCost"]

NOTHING = Amount(0.0, 0)
"""No credits and no images."""


@dataclass(frozen=True)
class ShardCost:
    """The most that the rows of a shard can cost.

    Attributes:
        total: all rows together.
        dearest: the dearest row.
        cheapest: the cheapest row.
    """

    total: Amount
    dearest: Amount
    cheapest: Amount


@dataclass
class Allocation:
    """The cap of a batch and the allowances that its runs hold.

    Guarantee: as long as no run spends more than its allowance, all of them together never spend more than the cap,
    however they end. Unreported allowances stay reserved.

    Attributes:
        cap: the batch's cap; infinite if there is none.
        reserved: by run, its allowance, or what it spent once that is settled.
    """

    cap: Amount
    reserved: dict[Hashable, Amount] = field(default_factory=dict)

    @property
    def available(self) -> Amount:
        """What can still be reserved."""
        # Summed from scratch each time, so that rounding errors don't accumulate.
        reserved = sum(self.reserved.values(), NOTHING)
        return Amount(_subtract(self.cap.credits, reserved.credits), _subtract(self.cap.images, reserved.images))

    def allowance(self, cost: ShardCost, waiting: int) -> Amount | None:
        """Compute the allowance of a shard, or None if it would not cover a single one of its rows.

        An even part of what is available, at least the cost of the shard's dearest row and at most that of all its
        rows. Infinite if the batch has no cap.

        Args:
            cost: what the shard's rows can cost.
            waiting: shards that wait for an allowance, including this one.
        """
        available = self.available
        allowance = Amount(
            _portion(available.credits, available.credits / waiting, cost.dearest.credits, cost.total.credits),
            _portion(available.images, _divide(available.images, waiting), cost.dearest.images, cost.total.images),
        )
        return allowance if cost.cheapest.fits(allowance) else None

    def reserve(self, run: Hashable, allowance: Amount) -> None:
        """Reserve an allowance for a run."""
        self.reserved[run] = allowance

    def settle(self, run: Hashable, spent: Amount) -> None:
        """Release what a run has not spent. Call it only when the run can't spend any more."""
        self.reserved[run] = spent


def _subtract(cap: float, reserved: float) -> float:
    return cap if math.isinf(cap) else max(0.0, cap - reserved)


def _portion(available: float, even: float, dearest: float, total: float) -> float:
    return available if math.isinf(available) else min(available, total, max(even, dearest))


def _divide(images: float, parts: int) -> float:
    return math.ceil(images / parts) if math.isfinite(images) else images
