"""The runs of a batch's shards, as Prefect knows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments.flow_runs import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Crashed

from flux_prefect.money.budget import Amount

__all__ = ["ShardRun", "ShardRuns"]

_PAGE = 200  # the most that the server gives at once


@dataclass(frozen=True)
class ShardRun:
    """One attempt at a shard.

    Attributes:
        id: the flow run's.
        shard: the shard's number.
        attempt: which one it is, from 0.
        share: what it was given.
    """

    id: UUID
    shard: int
    attempt: int
    share: Amount


class ShardRuns:
    """Starts, finds and follows the runs of one batch.

    Args:
        client: of Prefect's server.
        batch: the batch's name: two batches of one name share their runs.
        deployment: `flow/deployment`, of what runs a shard.
    """

    def __init__(self, client: PrefectClient, batch: str, deployment: str) -> None:
        self._client = client
        self._batch = batch
        self._deployment = deployment
        self._tag = f"flux-batch-{batch}"

    async def find(self) -> list[ShardRun]:
        """All that were ever started, by whomever, in the order of their attempts. A request for 200."""
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[self._tag]))
        found: list[ShardRun] = []
        while True:
            page = await self._client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE, offset=len(found))
            found += [_read(run) for run in page]
            if len(page) < _PAGE:
                return sorted(found, key=lambda run: (run.shard, run.attempt))

    async def start(
        self, shard: int, attempt: int, share: Amount, *, name: str, parameters: Mapping[str, Any]
    ) -> ShardRun:
        """Start an attempt at a shard, or find that it was started: once is all that it ever is.

        As a subflow run of the enclosing flow run. Some four requests.

        Args:
            shard: the shard's number.
            attempt: which one it is.
            share: what it is given.
            name: the run's, for people.
            parameters: of the deployment's flow, but for the caps.
        """
        run = await arun_deployment(
            self._deployment,
            client=self._client,
            parameters={
                **parameters,
                "max_credits": None if share.credits == float("inf") else share.credits,
                "max_images": None if share.images == float("inf") else int(share.images),
            },
            flow_run_name=name,
            timeout=0,
            tags=[self._tag],
            idempotency_key=f"{self._batch}-{shard}-{attempt}",
        )
        return _read(run)

    async def look(self, runs: Collection[UUID]) -> dict[UUID, State[Any]]:
        """The states of runs as they are now. One request for 200; runs that were deleted are not in it."""
        states: dict[UUID, State[Any]] = {}
        ids = list(runs)
        for place in range(0, len(ids), _PAGE):
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=ids[place : place + _PAGE]))
            found = await self._client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE)
            states |= {run.id: run.state for run in found if run.state is not None}
        return states

    async def declare_lost(self, run: UUID, message: str) -> None:
        """Have the run's page tell the truth."""
        await self._set_state(run, Crashed(name="Lost", message=message))

    async def cancel(self, run: UUID) -> None:
        """Have a run end in order. It takes up to half a minute."""
        await self._set_state(run, Cancelling(message="The batch was stopped."), force=False)

    async def _set_state(self, run: UUID, state: State[Any], *, force: bool = True) -> None:
        try:
            await self._client.set_flow_run_state(run, state, force=force)
        except ObjectNotFound:
            return  # somebody has deleted it


def _read(run: FlowRun) -> ShardRun:
    _, shard, attempt = str(run.idempotency_key).rsplit("-", 2)
    credits_given, images_given = run.parameters.get("max_credits"), run.parameters.get("max_images")
    share = Amount(
        float("inf") if credits_given is None else float(credits_given),
        float("inf") if images_given is None else int(images_given),
    )
    return ShardRun(run.id, int(shard), int(attempt), share)
