"""Prices and deprecations, as the service may write them."""

from __future__ import annotations

from typing import Any

import pytest

from flux_prefect.api.catalogue import Deprecation, parse_deprecations, parse_price
from flux_prefect.api.client import AimlApiClient
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox

DEV, PRO = "flux/dev", "flux-pro"


@pytest.mark.parametrize(
    ("pricing", "price"),
    [
        ({"credits": 50_000, "unit": "image"}, 50_000),
        ({"usd": 0.025}, 50_000),
        ({"credits": "50000", "usd": 0.025}, 50_000),
        ({"credits": 50_000, "unit": "megapixel"}, None),
        ({"credits": 0}, None),
        ({"credits": True}, None),
        ({}, None),
        (None, None),
    ],
)
def test_a_price_is_read_only_where_it_is_one(pricing: Any, price: float | None) -> None:
    """Credits or dollars an image; all else leaves the setting in force."""
    listed = [7, {"id": PRO, "pricing": {"credits": 1}}, {"id": DEV, "pricing": pricing}]
    assert parse_price({"data": listed}, DEV) == price
    assert parse_price(listed, DEV) == price


def test_deprecations_are_read_by_model() -> None:
    """What can't be understood is left out."""
    entry = {"id": DEV, "status": "withdrawn", "replaced_by": PRO, "since": "2026-08-01"}
    found = parse_deprecations({"data": [entry, {"id": PRO, "status": "new"}, {"status": "withdrawn"}, None]})
    assert found == {DEV: Deprecation(model=DEV, status="withdrawn", replaced_by=PRO)}
    assert str(found[DEV]) == "flux/dev is withdrawn, replaced by flux-pro"
    assert parse_deprecations("nothing") == {}


async def test_the_client_reads_both(sandbox: RunningSandbox, credentials: AimlApiCredentials) -> None:
    """From the service, at no cost."""
    sandbox.control.settings(prices={DEV: 31_000}, deprecations=[{"id": DEV, "status": "superseded"}])
    client: AimlApiClient
    async with credentials.get_client() as client:
        assert await client.price(DEV) == 31_000
        assert await client.price("flux/none") is None
        assert await client.deprecations() == {DEV: Deprecation(model=DEV, status="superseded")}
    assert sandbox.control.summary().calls == 0
