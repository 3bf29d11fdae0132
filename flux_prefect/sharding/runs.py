"""The flow runs of a batch's shards in Prefect."""

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

from flux_prefect.money.ledger import Amount

__all__ = ["ShardRun", "ShardRuns", "check_deployment"]

_PAGE = 200  # the most that the server returns in one response


@dataclass(frozen=True)
class ShardRun:
    """One attempt at a shard.

    Attributes:
        id: the id of the flow run.
        shard: the shard's number.
        attempt: the attempt's number, from 0.
        allowance: the most that it may spend.
    """

    id: UUID
    shard: int
    attempt: int
    allowance: Amount


class ShardRuns:
    """Start, find, cancel and read the state of one batch's runs.

    Args:
        client: a client of Prefect's server.
        batch: the batch's name. Two batches of the same name share their runs.
        deployment: the deployment that runs a shard, as `flow/deployment`.
    """

    def __init__(self, client: PrefectClient, batch: str, deployment: str) -> None:
        self._client = client
        self._batch = batch
        self._deployment = deployment
        self._tag = f"flux-batch-{batch}"

    async def find(self) -> list[ShardRun]:
        """Find every run that was ever started for this batch, by shard and attempt. One request per 200 runs."""
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[self._tag]))
        found: list[ShardRun] = []
        while True:
            page = await self._client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE, offset=len(found))
            found += [_parse_run(run) for run in page]
            if len(page) < _PAGE:
                return sorted(found, key=lambda run: (run.shard, run.attempt))

    async def start(
        self, shard: int, attempt: int, allowance: Amount, *, name: str, parameters: Mapping[str, Any]
    ) -> ShardRun:
        """Start an attempt at a shard, or return the run if it was started before: an attempt has one run.

        The run becomes a subflow run of the enclosing flow run. About four requests.

        Args:
            shard: the shard's number.
            attempt: the attempt's number.
            allowance: the most that the run may spend.
            name: the run's name in the UI.
            parameters: parameters of the deployment's flow, except the caps.
        """
        run = await arun_deployment(
            self._deployment,
            client=self._client,
            parameters={
                **parameters,
                "max_credits": None if allowance.credits == float("inf") else allowance.credits,
                "max_images": None if allowance.images == float("inf") else int(allowance.images),
            },
            flow_run_name=name,
            timeout=0,
            tags=[self._tag],
            idempotency_key=f"{self._batch}-{shard}-{attempt}",
        )
        return _parse_run(run)

    async def read_states(self, runs: Collection[UUID]) -> dict[UUID, State[Any]]:
        """Read the current states of runs. One request per 200 runs; deleted runs are left out."""
        states: dict[UUID, State[Any]] = {}
        ids = list(runs)
        for start in range(0, len(ids), _PAGE):
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + _PAGE]))
            found = await self._client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE)
            states |= {run.id: run.state for run in found if run.state is not None}
        return states

    async def set_lost(self, run: UUID, message: str) -> None:
        """Set a run to Crashed with the name Lost, so that its page no longer shows it as Running."""
        await self._set_state(run, Crashed(name="Lost", message=message))

    async def cancel(self, run: UUID) -> None:
        """Cancel a run, which then ends in order. It takes up to half a minute."""
        await self._set_state(run, Cancelling(message="The batch was stopped."), force=False)

    async def _set_state(self, run: UUID, state: State[Any], *, force: bool = True) -> None:
        try:
            await self._client.set_flow_run_state(run, state, force=force)
        except ObjectNotFound:
            return  # the run was deleted


async def check_deployment(client: PrefectClient, deployment: str) -> None:
    """Verify that the deployment of shards exists.

    Raises:
        ValueError: it does not. The message has the command that registers it.
    """
    try:
        await client.read_deployment_by_name(deployment)
    except ObjectNotFound as error:
        raise ValueError(
            f"deployment {deployment!r} does not exist on this Prefect server: register it with `flux-prefect deploy "
            "publish_shard --pool NAME`, or name the deployment of publish_shard that workers run. PREFECT_API_URL "
            "chooses the server."
        ) from error


def _parse_run(run: FlowRun) -> ShardRun:
    _, shard, attempt = str(run.idempotency_key).rsplit("-", 2)
    credits_given, images_given = run.parameters.get("max_credits"), run.parameters.get("max_images")
    allowance = Amount(
        float("inf") if credits_given is None else float(credits_given),
        float("inf") if images_given is None else int(images_given),
    )
    return ShardRun(run.id, int(shard), int(attempt), allowance)
