"""Runs of deployments, started as the form in Prefect's UI does."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound


async def run_deployment(name: str, parameters: dict[str, Any]) -> State[Any]:
    """Start a run with plain JSON, once somebody serves the deployment, and wait for its final state."""
    async with get_client() as client:
        for _ in range(600):
            try:
                deployment = await client.read_deployment_by_name(name)
                break
            except ObjectNotFound:
                await asyncio.sleep(0.1)
        else:
            raise AssertionError(f"no process serves {name}")
        run = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        for _ in range(900):
            state = (await client.read_flow_run(run.id)).state
            if state is not None and state.is_final():
                return state
            await asyncio.sleep(0.1)
    raise AssertionError("the run never came to its end")
