"""Serve every deployment of prefect.yaml from this one process: no work pool, no worker.

`python deployments/serve.py` works in any folder and needs only the installed package. Schedules, triggers, parameters,
tags and concurrency limits are those of prefect.yaml. Its `job_variables` do not apply: runs inherit this process's
environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentTriggerTypes, TriggerTypes
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from flux_prefect.cli.terminal import refuse_bad_settings

PREFECT_FILE = Path(__file__).with_name("prefect.yaml")

_TRIGGERS: TypeAdapter[list[DeploymentTriggerTypes | TriggerTypes]] = TypeAdapter(
    list[DeploymentTriggerTypes | TriggerTypes]
)


def read_deployments(path: Path = PREFECT_FILE) -> list[RunnerDeployment]:
    """Read the deployments of a prefect.yaml, for `prefect.serve`. Imports each flow.

    An entrypoint is a module path (`package.module.flow`), or a file's path (`flows/mine.py:flow`) relative to the
    working directory, as for `prefect deploy`.
    """
    content = YAML(typ="safe").load(path)
    return [_make_deployment(spec) for spec in content["deployments"]]


def _make_deployment(spec: Mapping[str, Any]) -> RunnerDeployment:
    entrypoint: str = spec["entrypoint"]
    flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    deployment = flow.to_deployment(
        name=spec["name"],
        description=spec.get("description"),
        tags=spec.get("tags"),
        parameters=spec.get("parameters"),
        schedules=[_make_schedule(schedule) for schedule in spec.get("schedules", ())],
        concurrency_limit=_make_limit(spec.get("concurrency_limit")),
        triggers=_TRIGGERS.validate_python(spec.get("triggers", [])),
        entrypoint_type=EntrypointType.FILE_PATH if ":" in entrypoint else EntrypointType.MODULE_PATH,
    )
    if not isinstance(deployment, RunnerDeployment):  # a coroutine, if an event loop is running
        raise TypeError("read_deployments can't be called from async code: call it in a thread without an event loop")
    return deployment


def _make_schedule(spec: Mapping[str, Any]) -> Schedule:
    given = dict(spec)
    if "interval" in given:
        given["interval"] = timedelta(seconds=given["interval"])
    return Schedule(**given)


def _make_limit(spec: Mapping[str, Any] | int | None) -> ConcurrencyLimitConfig | int | None:
    return ConcurrencyLimitConfig.model_validate(spec) if isinstance(spec, Mapping) else spec


def main(arguments: list[str] | None = None) -> None:
    """Serve until the process is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.serve", description="Serve every deployment of prefect.yaml."
    )
    parser.add_argument(
        "--prefect-file", type=Path, default=PREFECT_FILE, metavar="FILE", help="instead of prefect.yaml"
    )
    parser.add_argument("--limit", type=int, default=4, metavar="N", help="most runs at once (default 4)")
    given = parser.parse_args(arguments)
    refuse_bad_settings()  # the runs inherit them
    serve(*read_deployments(given.prefect_file), limit=given.limit)


if __name__ == "__main__":
    main()
