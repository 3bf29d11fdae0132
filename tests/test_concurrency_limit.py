"""A Prefect global concurrency limit over the paid calls of all workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flux_prefect.api.models import ImageRequest
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import Billed, NotSent
from flux_prefect.sandbox.launching import RunningSandbox


@pytest.fixture
async def limit(prefect_server: str) -> AsyncIterator[str]:  # noqa: ARG001 - the one that get_client finds
    """A limit of two, by its name."""
    name = f"flux-{uuid4().hex[:8]}"
    async with get_client() as prefect:
        await prefect.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=2))
        yield name
        await prefect.delete_global_concurrency_limit_by_name(name)


async def test_no_more_calls_than_slots_are_out_at_once(
    limit: str, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """Whatever each worker's own in-flight limit is; and every slot comes back."""
    sandbox.control.settings(latency=0.3)
    account = credentials.model_copy(update={"concurrency_limit": limit, "max_in_flight": 6})
    await account.check()
    async with account.get_client() as one, account.get_client() as other:
        requests = [ImageRequest(prompt=f"slot {number} {limit}", seed=1) for number in range(6)]
        await asyncio.gather(*(client.generate(request) for client in (one, other) for request in requests[:3]))
    summary = sandbox.control.summary()

    assert summary.billed_calls == 6
    assert summary.peak_in_flight == 2
    async with get_client() as prefect:
        assert (await prefect.read_global_concurrency_limit_by_name(limit)).active_slots == 0


async def test_a_limit_that_is_missing_is_found_before_anything_is_sent(
    prefect_server: str,  # noqa: ARG001 - the one that is asked
    credentials: AimlApiCredentials,
) -> None:
    """With the command that makes it."""
    account = credentials.model_copy(update={"concurrency_limit": "never-created"})
    with pytest.raises(ValueError, match="prefect gcl create never-created --limit 16"):
        await account.check()


async def test_without_its_server_nothing_is_sent(credentials: AimlApiCredentials, sandbox: RunningSandbox) -> None:
    """A slot that can't be asked for stops the call, which cost nothing."""
    account = credentials.model_copy(update={"concurrency_limit": "any"})
    nowhere = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0})
    async with account.get_client() as client:
        with nowhere, pytest.raises(NotSent, match="No slot of the concurrency limit 'any'") as caught:
            await client.generate(ImageRequest(prompt="never sent", seed=1))
    assert caught.value.billed is Billed.NO
    assert sandbox.control.summary().calls == 0
