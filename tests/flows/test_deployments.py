"""The deployments of `deployments/` on a real Prefect server: what they are, when they start, and what they start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, FlowRun, State
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import Flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Pending
from ruamel.yaml import YAML
from support.team import Team, start_team
from support.waiting import wait_for

from deployments.serve import PREFECT_FILE, read_deployments
from flux_prefect import flows
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox

DAILY, BATCH, AUDIT = "publish-daily/daily", "publish-batch/on-demand", "audit-bucket/after-each-batch"


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A server of this module's own, as that of the other tests has no scheduler."""
    settings = {
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
    }
    with start_team(tmp_path_factory.mktemp("server") / "home", settings) as team:
        yield team


@pytest.fixture(scope="module")
def deployed(team: Team) -> Team:
    """The server with all of prefect.yaml on it."""
    team.deploy(PREFECT_FILE)
    return team


def test_every_flow_is_deployed(deployed: Team) -> None:
    """Every module of the package that holds a flow is in prefect.yaml, as a module path that workers import."""
    entrypoints = {deployment.entrypoint for deployment in deployed.client.read_deployments()}
    modules = [import_module(f"{flows.__name__}.{module.name}") for module in iter_modules(flows.__path__)]

    assert entrypoints == {
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Flow) and value.__module__ == module.__name__
    }


def test_a_deployment_is_as_its_file_says(deployed: Team) -> None:
    """Time zone, the paused example, parameters, tags, collision strategy and job variables arrive; no pull step."""
    daily = deployed.find(DAILY)
    schedules = {schedule.slug: schedule for schedule in daily.schedules}

    assert {slug: schedule.active for slug, schedule in schedules.items()} == {
        "every-morning": True,
        "monday-plan": False,
    }
    morning = schedules["every-morning"].schedule
    assert isinstance(morning, CronSchedule)
    assert (morning.cron, morning.timezone) == ("0 6 * * *", "Europe/Berlin")
    assert schedules["monday-plan"].parameters == {"dry_run": True}
    assert daily.parameters["bucket"] == "catalogue"
    assert daily.tags == ["flux", "scheduled"]
    assert daily.concurrency_options is not None
    assert daily.concurrency_options.collision_strategy is ConcurrencyLimitStrategy.CANCEL_NEW
    assert daily.global_concurrency_limit is not None
    assert daily.global_concurrency_limit.limit == 1
    assert daily.work_pool_name == "images"
    assert daily.job_variables["env"]["FLUX_PREFECT_RETRIES"] == "4"
    assert (daily.pull_steps or [], daily.path) == ([], None)


def test_serve_takes_the_same_deployments(deployed: Team) -> None:
    """Served from one process, they have the entrypoints, parameters, schedules and limits of the work pool's."""
    served = {f"{deployment.flow_name}/{deployment.name}": deployment for deployment in read_deployments()}

    assert len(served) == len(deployed.client.read_deployments())
    for name, deployment in served.items():
        other = deployed.find(name)
        assert deployment.entrypoint == other.entrypoint
        assert deployment.parameters == other.parameters
        assert deployment.tags == other.tags
        assert deployment.description == other.description
        assert {(s.slug, s.active, json.dumps(s.parameters)) for s in deployment.schedules or []} == {
            (s.slug, s.active, json.dumps(s.parameters)) for s in other.schedules
        }
        assert deployment.concurrency_limit == (other.global_concurrency_limit and other.global_concurrency_limit.limit)
        assert deployment.concurrency_options == other.concurrency_options
    assert [trigger.model_dump()["name"] for trigger in served[AUDIT].triggers] == ["audit after each batch"]


@pytest.mark.parametrize(
    ("name", "parameters", "second"),
    [(DAILY, {}, "Cancelled"), (BATCH, {"source": "prompts.csv"}, "AwaitingConcurrencySlot")],
)
def test_two_runs_at_once_collide_as_configured(
    deployed: Team, name: str, parameters: dict[str, Any], second: str
) -> None:
    """The day's second run is cancelled; a second batch waits for the first."""
    client, deployment = deployed.client, deployed.find(name)
    runs = [client.create_flow_run_from_deployment(deployment.id, parameters=parameters) for _ in range(2)]
    states: list[State[Any] | None] = [client.set_flow_run_state(run.id, Pending()).state for run in runs]
    for run in runs:  # which gives the place back
        client.set_flow_run_state(run.id, Cancelled())

    assert [state and state.name for state in states] == ["Pending", second]


@pytest.fixture
def hasty(tmp_path: Path) -> Path:
    """A prefect.yaml whose day begins now, and again soon: the same in all else but the table."""
    content = YAML(typ="safe").load(PREFECT_FILE)
    daily, audit = (
        next(spec for spec in content["deployments"] if spec["name"] == name) for name in ("daily", "after-each-batch")
    )
    lot = uuid4().hex
    daily["parameters"] |= {"source": [{"id": "mug", "prompt": "a mug {{ lot }}", "lot": lot}]}
    soon = (datetime.now(timezone.utc) + timedelta(seconds=1)).isoformat()
    for schedule in daily["schedules"]:
        del schedule["cron"]
        schedule |= {"interval": 10, "anchor_date": soon}
    file = tmp_path / "prefect.yaml"
    YAML(typ="safe").dump({**content, "deployments": [daily, audit]}, file)
    return file


@pytest.fixture
def worker(team: Team, sandbox: RunningSandbox, tmp_path: Path) -> Iterator[None]:  # noqa: ARG001 - it must be up
    """A worker of the pool. It has no account of its own: that is in the blocks."""
    with team.worker(tmp_path):
        yield


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("worker")
def test_a_schedule_starts_a_day_and_its_batch_starts_the_audit(
    team: Team,
    hasty: Path,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    sandbox: RunningSandbox,
    tmp_path: Path,
) -> None:
    """The schedule and the batch's event start the runs; the paused schedule starts none."""
    with temporary_settings({PREFECT_API_URL: team.url}):
        bucket.save("catalogue", overwrite=True)
        credentials.save("studio", overwrite=True)
    team.deploy(hasty)

    def finished(name: str) -> FlowRun | None:
        return next((run for run in team.runs(name) if run.state and run.state.is_completed()), None)

    def describe() -> str:
        runs = [f"{run.name}: {run.state!r}" for name in (DAILY, AUDIT) for run in team.runs(name)]
        return "\n".join([*runs, (tmp_path / "worker.log").read_text()])

    day, audit = (
        wait_for(partial(finished, name), seconds=100, every=0.3, describe=describe) for name in (DAILY, AUDIT)
    )

    assert day.auto_scheduled
    assert day.state is not None
    assert str(day.state.message).startswith("1 published")
    assert sandbox.control.summary().billed_calls == 1
    assert audit.created_by is not None
    assert audit.created_by.type == "AUTOMATION"
    assert audit.parameters["bucket"] == "catalogue"
    assert audit.parameters["manifest"].startswith(f"{bucket.uri}/manifests/")
    assert audit.state is not None
    assert audit.state.message == "1 images: 1 ok"
    assert not any(run.parameters.get("dry_run") for run in team.runs(DAILY))
