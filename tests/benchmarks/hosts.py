"""Simulated machines: each is a worker with its own Prefect home, spool and locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings

from flux_prefect.flows.publish_shard import publish_shard
from flux_prefect.host.spool import Spool

from .processes import cpu_seconds, family_cpu_seconds

ROOT = Path(__file__).parents[2]
POOL = "shards"


class Host:
    """One machine with a worker.

    Args:
        folder: its own; the worker's log is there.
        environment: what all machines have.

    Attributes:
        spool: of its runs.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = own_environment(environment, folder)
        self.spool = Spool(folder / "spool")
        self._worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start its worker, unless it runs."""
        if self._worker is not None:
            return
        with (self._folder / "worker.log").open("ab") as log:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", self._folder.name],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the worker in its turn
            )

    def kill(self) -> None:
        """End the worker and all that it has started, with kill -9, in an order in which nobody sees another die."""
        if self._worker is None:
            return
        for pid in [self._worker.pid, *descendants(self._worker.pid)]:
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)
        self._worker.wait()
        self._worker = None

    def cpu_seconds(self) -> float:
        """CPU time of the worker and of all that it has run; 0 where it was killed."""
        if self._worker is None:
            return 0.0
        living = sum(cpu_seconds(pid) for pid in descendants(self._worker.pid))
        return living + family_cpu_seconds(self._worker.pid)


def own_environment(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment of a machine of its own."""
    return {
        **environment,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_HOME": str(folder / "home"),
        "FLUX_PREFECT_SPOOL": str(folder / "spool"),
        "FLUX_PREFECT_LOCKS": str(folder / "locks"),
    }


def deploy_shard(api_url: str) -> None:
    """Make the work pool on a new server, and deploy what runs a shard there: `publish-shard/worker`."""
    with temporary_settings({PREFECT_API_URL: api_url}), SyncPrefectClient(api_url) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        found = publish_shard.from_source(str(ROOT), "flux_prefect/flows/publish_shard.py:publish_shard")
        assert isinstance(found, Flow)  # no coroutine, as no loop is running
        found.deploy("worker", work_pool_name=POOL, print_next_steps=False, ignore_warnings=True)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs; parents before their children."""
    children: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        if parent == pid:
            children.append(int(path.parent.name))
    return [one for child in children for one in (child, *descendants(child))]
