from __future__ import annotations

import asyncio
import time

import pytest

from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox

HIDDEN = 7
LATENCY = 0.15
SETTLED_AFTER = 3.0  # seconds; on the first burst's pause, and the half of the limit after it


@pytest.mark.parametrize(("max_in_flight", "calls", "retry_after"), [(16, 300, 0.5), (50, 1000, None)])
async def test_an_unknown_limit_is_found_and_kept(
    max_in_flight: int,
    calls: int,
    retry_after: float | None,
    credentials: AimlApiCredentials,
    sandbox: RunningSandbox,
) -> None:
    """Of all calls under 5 % are refused, the limit stays near seven, and hardly a place is left empty."""
    sandbox.control.settings(max_in_flight=HIDDEN, latency=LATENCY, retry_after=retry_after, fast=True)
    pacer = Pacer(max_in_flight)
    limits: list[int] = []
    places_used: list[float] = []
    todo = iter(range(calls))

    async def generate(client: AimlApiClient) -> None:
        for number in todo:
            await client.generate(ImageRequest(prompt=f"lighthouse number {number}", seed=7))

    async def watch() -> None:
        started = time.monotonic()
        while True:
            await asyncio.sleep(0.02)
            places_used.append(min(pacer.in_flight, HIDDEN) / HIDDEN)
            if time.monotonic() - started > SETTLED_AFTER:
                limits.append(pacer.limit)

    async with AimlApiClient(api_key=credentials.api_key, base_url=credentials.base_url, pacer=pacer) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(generate(client) for _ in range(max_in_flight)))
        watching.cancel()

    totals = sandbox.control.summary()
    assert (totals.billed_calls, totals.peak_in_flight) == (calls, HIDDEN)
    assert 0 < totals.refused < 0.05 * totals.calls
    # A refused try halves the limit for a moment.
    assert sum(6 <= limit <= 8 for limit in limits) > 0.85 * len(limits)
    # Of places, not of images a second: those are also a matter of how busy this machine is.
    assert sum(places_used) > 0.85 * len(places_used)
