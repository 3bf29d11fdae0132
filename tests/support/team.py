"""A team's Prefect: a server with a work pool, and how the README has people use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.prefect_server import start_prefect
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
)
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.client.schemas.responses import DeploymentResponse

ROOT = Path(__file__).parents[2]
POOL = "images"


class Team:
    """A Prefect server with a work pool.

    Attributes:
        url: the address of its API.
        client: of that API.
        environment: what its command lines and workers need.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = SyncPrefectClient(url)
        self.environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_WORKER_QUERY_SECONDS": "1"}

    def prefect(self, *arguments: str) -> None:
        """Run the command line in a folder without a checkout."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd="/",
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def deploy(self, file: Path) -> None:
        """Deploy everything in a prefect.yaml."""
        self.prefect("--no-prompt", "deploy", "--prefect-file", str(file), "--all")

    def find(self, name: str) -> DeploymentResponse:
        """The deployment of that name."""
        return self.client.read_deployment_by_name(name)

    def runs(self, name: str) -> list[FlowRun]:
        """All runs of a deployment."""
        wanted = FlowRunFilterDeploymentId(any_=[self.find(name).id])
        return self.client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=wanted))

    def artifact(self, run: FlowRun, key: str) -> Artifact:
        """The artifact of that key that a run has left."""
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]), key=ArtifactFilterKey(any_=[key]))
        (artifact,) = self.client.read_artifacts(artifact_filter=wanted)
        return artifact

    @contextmanager
    def worker(self, folder: Path) -> Iterator[None]:
        """A worker of the pool, in that folder, with its log there. What it runs has this process's environment."""
        with (
            (folder / "worker.log").open("wb") as log,
            subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL],
                cwd=folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                yield
            finally:
                process.terminate()


@contextmanager
def start_team(home: Path, settings: Mapping[str, str]) -> Iterator[Team]:
    """A team's server with its work pool, some fifteen seconds later; it dies with this process.

    Args:
        home: its folder, which must not exist yet.
        settings: PREFECT_ variables of the server's own.
    """
    with start_prefect(home, settings, database_template(settings)) as server:
        team = Team(server.api_url)
        with team.client:
            team.client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
            yield team


def database_template(settings: Mapping[str, str]) -> Path | None:
    """A new SQLite database of Prefect's for a server with these settings, where the test run has one."""
    template = os.environ.get("FLUX_PREFECT_TEST_DATABASE")
    return None if template is None or "PREFECT_API_DATABASE_CONNECTION_URL" in settings else Path(template)
