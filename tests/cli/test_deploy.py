"""`flux-prefect deploy`: what it registers on a real Prefect server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import get_args
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings

import flux_prefect.flows
from flux_prefect.cli.app import main
from flux_prefect.cli.deploy import FlowName

FLOWS = get_args(FlowName)


@pytest.fixture
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    """The server's API."""
    with SyncPrefectClient(prefect_server) as api:
        yield api


@pytest.fixture
def pool(client: SyncPrefectClient) -> str:
    """A process pool of the test's own."""
    return client.create_work_pool(WorkPoolCreate(name=f"pool {uuid4().hex[:8]}", type="process")).name


def test_every_flow_that_ships_can_be_deployed() -> None:
    """A module that is added to flux_prefect.flows is missed here."""
    modules = {path.stem for path in Path(flux_prefect.flows.__file__).parent.glob("[a-z]*.py")}

    assert set(FLOWS) == modules - {"form_types"}


def test_all_flows_are_registered_by_module_path(
    client: SyncPrefectClient, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without pull steps or a path: a worker imports them. What is printed can be pasted."""
    status = main(["deploy", "--pool", pool, "--bucket", "catalogue", "--credentials", "studio", "--tag", "shop"])

    assert status == 0
    printed = capsys.readouterr().out
    for name in FLOWS:
        own = "worker" if name == "publish_shard" else "on-demand"
        full = f"{name.replace('_', '-')}/{own}"
        found = client.read_deployment_by_name(full)
        assert full in printed
        assert found.entrypoint == f"flux_prefect.flows.{name}.{name}"
        assert load_flow_from_entrypoint(found.entrypoint, use_placeholder_flow=False).name == full.partition("/")[0]
        assert (found.pull_steps or [], found.path) == ([], None)
        assert found.work_pool_name == pool
        assert found.tags == ["flux", "shop"]
        assert found.parameters == {"bucket": "catalogue", "credentials": "studio"}
        assert found.parameter_openapi_schema is not None
        assert set(found.parameters) <= set(found.parameter_openapi_schema["properties"])
    assert f"prefect worker start --pool '{pool}'" in printed


def test_deploying_again_keeps_schedules_and_replaces_the_rest(
    client: SyncPrefectClient, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One deployment stays one, with its id; a schedule that was added stays."""
    name = f"mine-{uuid4().hex[:8]}"
    command = ["deploy", "publish_image", "--pool", pool, "--name", name, "--json"]
    assert main([*command, "--bucket", "s3://images/old"]) == 0
    (first,) = json.loads(capsys.readouterr().out)["deployments"]
    daily = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(days=1)), active=False)
    client.create_deployment_schedules(first["id"], [daily])
    assert main([*command, "--bucket", "s3://images/new"]) == 0
    (second,) = json.loads(capsys.readouterr().out)["deployments"]

    found = client.read_deployment_by_name(f"publish-image/{name}")
    assert first == second == {"id": str(found.id), "name": f"publish-image/{name}", "entrypoint": found.entrypoint}
    assert found.parameters == {"bucket": "s3://images/new"}
    assert len(found.schedules) == 1


def test_a_deployment_with_pull_steps_loses_them(client: SyncPrefectClient, pool: str) -> None:
    """One that was made from a checkout becomes one of the installed package."""
    name = f"old-{uuid4().hex[:8]}"
    step = {"prefect.deployments.steps.set_working_directory": {"directory": "/nowhere"}}
    flow_id = client.create_flow_from_name("publish-image")
    entrypoint = "flows/publish_image.py:publish_image"
    made_id = client.create_deployment(flow_id, name, entrypoint=entrypoint, pull_steps=[step], path="/nowhere")
    assert main(["deploy", "publish_image", "--pool", pool, "--name", name]) == 0

    found = client.read_deployment(made_id)
    assert found.entrypoint == "flux_prefect.flows.publish_image.publish_image"
    assert not found.pull_steps


def test_a_missing_pool_is_named_with_the_remedy(client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and nothing is registered."""
    before = len(client.read_deployments())
    assert main(["deploy", "--pool", "no such pool"]) == 2

    assert "prefect work-pool create 'no such pool' --type process" in capsys.readouterr().err
    assert len(client.read_deployments()) == before


def test_without_a_server_nothing_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    """A temporary server would forget the deployments."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert main(["deploy", "--pool", "images"]) == 2

    assert "PREFECT_API_URL is not set" in capsys.readouterr().err


def test_a_flow_that_does_not_ship_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With the names of those that do."""
    assert main(["deploy", "no_flow", "--pool", "images"]) == 2

    printed = capsys.readouterr()
    assert "publish_batch" in printed.out + printed.err
