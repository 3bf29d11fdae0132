"""How often a batch looks at the runs of its shards."""

from __future__ import annotations

import pytest

from flux_prefect.sharding.supervisor import ShardingOptions


async def resize(limit: int | None) -> None:
    """No limit follows."""


@pytest.mark.parametrize(("lost_after", "expected"), [(5, 0.125), (40, 1), (80, 2), (3600, 2)])
def test_a_loss_that_is_to_be_noticed_soon_is_looked_for_often(lost_after: float, expected: float) -> None:
    """Forty times within the patience, and every two seconds at the least."""
    assert ShardingOptions(1, lost_after, {}, resize).poll_seconds == expected
