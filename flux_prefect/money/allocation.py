"""How a batch's cap is shared among its shards, so that all of them together never pass it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from flux_prefect.money.budget import Amount

__all__ = ["Need", "Purse"]

NOTHING = Amount(0.0, 0)
"""No money and no images."""


@dataclass(frozen=True)
class Need:
    """What the rows of a shard can cost.

    Attributes:
        most: all of them.
        dearest: the dearest of them.
        cheapest: the cheapest of them.
    """

    most: Amount
    dearest: Amount
    cheapest: Amount


@dataclass
class Purse:
    """What a batch may spend, less all that shards were given and did not give back.

    Guarantee: as long as no run spends more than it was given, all of them together never spend more than the cap,
    whatever becomes of them. What nobody has told of stays given.

    Attributes:
        cap: of the batch; infinite where there is none.
        taken: what each run was given, or once it has told of it, has spent.
    """

    cap: Amount
    taken: dict[Hashable, Amount] = field(default_factory=dict)

    @property
    def left(self) -> Amount:
        """What can still be given."""
        # Added up anew each time: rounding errors do not stay.
        taken = sum(self.taken.values(), NOTHING)
        return Amount(_subtract(self.cap.credits, taken.credits), _subtract(self.cap.images, taken.images))

    def share(self, need: Need, waiting: int) -> Amount | None:
        """What a shard is to be given; None where that would not do for a single one of its rows.

        An even part of what is left, at least what its dearest row costs, and no more than all of its rows. Where there
        is no cap, there is none for the shard.

        Args:
            need: the shard's.
            waiting: shards that are to be given something, this one among them.
        """
        left = self.left
        share = Amount(
            _part(left.credits, left.credits / waiting, need.dearest.credits, need.most.credits),
            _part(left.images, _divide(left.images, waiting), need.dearest.images, need.most.images),
        )
        return share if need.cheapest.fits(share) else None

    def give(self, run: Hashable, share: Amount) -> None:
        """Set a share aside for a run."""
        self.taken[run] = share

    def settle(self, run: Hashable, spent: Amount) -> None:
        """Take back what a run has not spent. To be called when it can't spend any more."""
        self.taken[run] = spent


def _subtract(cap: float, taken: float) -> float:
    return cap if math.isinf(cap) else max(0.0, cap - taken)


def _part(left: float, even: float, dearest: float, most: float) -> float:
    return left if math.isinf(left) else min(left, most, max(even, dearest))


def _divide(images: float, parts: int) -> float:
    return math.ceil(images / parts) if math.isfinite(images) else images
