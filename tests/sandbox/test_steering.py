from __future__ import annotations

from typing import Any

import pytest

from flux_prefect.sandbox.control import SandboxControl, SandboxRefused
from flux_prefect.sandbox.launching import RunningSandbox

from .plain_client import PlainClient


def test_settings_change_alone(sandbox: RunningSandbox) -> None:
    """A change touches the settings that it names, and the answer shows them all."""
    before = sandbox.control.settings()
    after = sandbox.control.settings(price=5, balance=10)
    assert after == before.model_copy(update={"price": 5, "balance": 10})
    assert sandbox.control.settings() == after


@pytest.mark.parametrize("change", [{"latency": -1}, {"latncy": 1}, {"response_shape": "xml"}, {"balance": 1.5}])
def test_a_wrong_setting_is_refused_and_changes_nothing(change: dict[str, Any], sandbox: RunningSandbox) -> None:
    """With the setting's name in the reason."""
    before = sandbox.control.settings()
    with pytest.raises(SandboxRefused, match=next(iter(change))):
        sandbox.control.settings(price=1, **change)
    assert sandbox.control.settings() == before


def test_reset_makes_it_new(client: PlainClient, sandbox: RunningSandbox) -> None:
    """Ledger, images, faults and settings are as at the start; the command line's settings stay."""
    start = sandbox.control.settings()
    url = client.url()
    sandbox.control.settings(latency=0.1, price=1, response_shape="data")
    sandbox.control.inject("server_error", times=None)
    sandbox.control.reset()

    assert sandbox.control.settings() == start
    assert start.latency == 0
    report = sandbox.control.ledger()
    assert report.rows == []
    assert (report.totals.calls, report.totals.downloads, report.totals.credits) == (0, 0, 0)
    assert client.http.get(url).status_code == 404
    assert client.post().status_code == 200


def test_the_ledger_adds_up(client: PlainClient, sandbox: RunningSandbox) -> None:
    """The totals are the sums of the rows, and what was billed is what the balance lost."""
    before = sandbox.control.settings().balance
    sandbox.control.settings(price=1_000)
    for fault in ("server_error", "gateway_timeout_billed", "moderation"):
        sandbox.control.inject(fault)
    for seed in range(1, 7):
        client.post(seed=seed, num_images=2)
    client.post(seed=0)

    report = sandbox.control.ledger()
    assert report.totals == sandbox.control.summary()
    assert report.totals.calls == len(report.rows) == 7
    assert report.totals.billed_calls == sum(row.billed for row in report.rows) == 4
    assert report.totals.billed_images == sum(row.images for row in report.rows) == 8
    assert report.totals.credits == sum(row.credits for row in report.rows) == 8_000
    assert report.totals.refused == 3
    assert before - report.totals.balance == 8_000
    assert [row.seed for row in report.rows] == [1, 2, 3, 4, 5, 6, None]


def test_control_can_be_used_by_its_address_alone(sandbox: RunningSandbox) -> None:
    """A sandbox can be steered by its URL alone."""
    with SandboxControl(sandbox.url) as control:
        assert control.summary().calls == 0
