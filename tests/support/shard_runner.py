"""Shards run without a worker: each forked from a warm process, on one machine or another in turn.

A worker takes some eight seconds of CPU time a run, nearly all of it for imports. What a run does is the same here: a
process of its own with a spool and locks of its machine, Prefect's own engine, and a SIGTERM where it is cancelled.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.engine import handle_engine_signals
from prefect.flow_engine import load_flow_run, run_flow_async
from prefect.states import Pending
from typing_extensions import Self

from .nursery import Nursery

_EVERY = 0.2
_MACHINES = ("north", "south")


class ShardRunner:
    """Starts what is scheduled of a deployment, while its `with` block runs.

    Args:
        url: the address of Prefect's API.
        deployment: the deployment's id.
        environment: what all machines have.
        folder: for the machines' folders.
    """

    def __init__(self, url: str, deployment: UUID, environment: Mapping[str, str], folder: Path) -> None:
        self._client = SyncPrefectClient(url)
        self._deployment = FlowRunFilterDeploymentId(any_=[deployment])
        self._nursery = Nursery({**environment, "PREFECT_API_URL": url})
        self._machines = itertools.cycle(folder / name for name in _MACHINES)
        self._processes: dict[UUID, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> Self:
        self._nursery.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._nursery.__exit__(kind, error, trace)

    def _go_on(self) -> None:
        with self._client:
            while not self._ended.wait(_EVERY):
                with suppress(httpx.HTTPError):  # the server has much to do: the next look is as good
                    self._look()

    def _look(self) -> None:
        for run in self._find(StateType.SCHEDULED):
            if run.id not in self._processes:
                self._start(run)
        for run in self._find(StateType.CANCELLING):
            if (process := self._processes.pop(run.id, None)) is not None:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)

    def _find(self, state: StateType) -> list[FlowRun]:
        states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[state]))
        return self._client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=self._deployment, state=states))

    def _start(self, run: FlowRun) -> None:
        machine = next(self._machines)
        machine.mkdir(exist_ok=True)
        self._client.set_flow_run_state(run.id, Pending())
        self._processes[run.id] = self._nursery.fork(
            "tests.support.shard_runner",
            [str(run.id)],
            {"FLUX_PREFECT_SPOOL": str(machine / "spool"), "FLUX_PREFECT_LOCKS": str(machine / "locks")},
            machine / "said.txt",
        )


def main(arguments: list[str]) -> int:
    """Run the flow run of this id, as a worker's process does; returns the exit status."""
    from flux_prefect.flows.publish_shard import publish_shard  # noqa: PLC0415 - the tests' own process needs it not

    flow: Any = publish_shard  # Prefect's own type for it is too narrow
    run = load_flow_run(UUID(arguments[0]))
    with handle_engine_signals(run.id):
        asyncio.run(run_flow_async(flow, flow_run=run, parameters=run.parameters))
    sys.stdout.flush()
    return 0
