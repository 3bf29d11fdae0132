"""`python deployments/serve.py` as a process: it takes runs, its triggers start others, and it ends at a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from benchmarks.prefect_server import NO_UI, start_prefect
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from support.team import database_template
from support.waiting import wait_for

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.sandbox.launching import RunningSandbox

ROOT = Path(__file__).parents[2]
BATCH, AUDIT = "publish-batch/on-demand", "audit-bucket/after-each-batch"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """A server of this module's own: on that of the other tests, the trigger would see every test's batches."""
    home = tmp_path_factory.mktemp("server") / "home"
    with start_prefect(home, NO_UI, database_template(NO_UI)) as server, SyncPrefectClient(server.api_url) as api:
        yield api


@pytest.fixture
def served(client: SyncPrefectClient, sandbox: RunningSandbox, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a folder and session of its own, with the sandbox's account in its environment; see serve.log."""
    environment = {
        **os.environ,
        **sandbox.environment,
        "PREFECT_API_URL": str(client.api_url).rstrip("/"),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    }
    with (
        (tmp_path / "serve.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, ROOT / "deployments" / "serve.py"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            wait_for(lambda: polled(client), seconds=90, every=0.3)
            yield process
        finally:
            process.kill()
            for deployment in client.read_deployments():
                client.delete_deployment(deployment.id)


def find(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """The deployment of that name, where there is one."""
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def polled(client: SyncPrefectClient) -> DeploymentResponse | None:
    """The last deployment of the file, once the process has asked for its runs."""
    deployment = find(client, AUDIT)
    return None if deployment is None or deployment.last_polled is None else deployment


def completed(client: SyncPrefectClient, name: str) -> FlowRun | None:
    """The deployment's run that is Completed. One that ended otherwise fails the test."""
    deployment = find(client, name)
    assert deployment is not None
    wanted = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    for run in client.read_flow_runs(deployment_filter=wanted):
        if run.state is not None and run.state.is_final():
            assert run.state.is_completed(), run.state.message
            return run
    return None


def left_of(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the process's session is still there."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_runs_a_batch_and_the_audit_that_follows_it(
    client: SyncPrefectClient, served: subprocess.Popen[bytes], bucket: ImageBucket, sandbox: RunningSandbox
) -> None:
    """No worker and no work pool; at a SIGTERM all of it is gone."""
    batch = find(client, BATCH)
    assert batch is not None
    rows = [{"id": "mug", "prompt": f"a mug {uuid4().hex}", "seed": 1}]
    client.create_flow_run_from_deployment(
        batch.id, parameters={"source": rows, "bucket": bucket.uri, "credentials": None}
    )
    published, audited = (wait_for(partial(completed, client, name), seconds=90, every=0.3) for name in (BATCH, AUDIT))

    assert published.state is not None
    assert str(published.state.message).startswith("1 published")
    assert audited.state is not None
    assert audited.state.message == "1 images: 1 ok"
    assert sandbox.control.summary().billed_calls == 1

    served.send_signal(signal.SIGTERM)
    assert served.wait(30) == 0
    assert not left_of(served)


def test_ctrl_c_ends_it(client: SyncPrefectClient, served: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """As people stop it: without a traceback, and with its schedules paused, so that no run waits for nobody."""
    assert not any(deployment.paused for deployment in client.read_deployments())
    served.send_signal(signal.SIGINT)

    assert served.wait(30) == 0
    assert not left_of(served)
    assert all(deployment.paused for deployment in client.read_deployments())
    assert "Traceback" not in (tmp_path / "serve.log").read_text(encoding="utf-8")
