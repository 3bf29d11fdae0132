"""`flux-prefect deploy`: register the flows that ship on a work pool."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, cast, get_args

from cyclopts import Parameter
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkPool
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType

from flux_prefect.cli.exit_status import MISUSED

__all__ = ["FlowName", "NotDeployable", "Registered", "deploy", "make_deployment", "register"]

FlowName = Literal[
    "publish_image",
    "publish_batch",
    "publish_sharded",
    "publish_shard",
    "publish_daily",
    "backfill",
    "sweep_seeds",
    "audit_bucket",
]
"""The flows that ship."""

ON_DEMAND = "on-demand"
"""The usual name of a deployment without a schedule."""

_SHARD_NAME = "worker"  # the second half of publish_sharded's default for `deployment`
_KEPT = {"schedules", "paused", "concurrency_limit", "concurrency_options", "job_variables"}


class NotDeployable(Exception):
    """Flows can't be registered; the message has the remedy."""


@dataclass(frozen=True)
class Registered:
    """A deployment on the server.

    Attributes:
        id: its id.
        name: its full name, for `prefect deployment run`.
        entrypoint: the module path by which a worker imports the flow.
    """

    id: str
    name: str
    entrypoint: str


def make_deployment(  # noqa: PLR0913 - keyword-only from the second on
    flow_name: FlowName,
    *,
    pool: str | None = None,
    name: str = ON_DEMAND,
    bucket: str | None = None,
    credentials: str | None = None,
    tags: Sequence[str] = (),
) -> RunnerDeployment:
    """Describe the deployment of a flow that ships, for `register` or `prefect.serve`. Reaches no server.

    The entrypoint is a module path: a worker imports the flow from the installed package, without any pull step.

    Args:
        flow_name: the flow.
        pool: the work pool; None to serve it.
        name: the deployment's name. That of publish_shard is always `worker`, as publish_sharded expects it.
        bucket: the default of the parameter `bucket`.
        credentials: the default of the parameter `credentials`.
        tags: tags beside `flux`.
    """
    flow: Flow[..., Any] = getattr(import_module(f"flux_prefect.flows.{flow_name}"), flow_name)
    given = {"bucket": bucket, "credentials": credentials}
    deployment = RunnerDeployment.from_flow(
        flow,
        name=_SHARD_NAME if flow_name == "publish_shard" else name,
        parameters={key: value for key, value in given.items() if value and key in flow.parameters.properties},
        tags=["flux", *tags],
        work_pool_name=pool,
        # Without a colon, as Prefect itself writes module paths: one with a colon counts as a file's, and a worker
        # without pull steps would first copy its working directory.
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    # Fields that count as given replace what people have set on the server, even where they are empty.
    deployment.model_fields_set.difference_update(_KEPT)
    return deployment


def register(deployments: Sequence[RunnerDeployment], pool: str) -> list[Registered]:
    """Register deployments on a work pool. One of the same name keeps schedules, limits, job variables and runs.

    Raises:
        NotDeployable: the server has no such pool, or PREFECT_API_URL is not set. Nothing was registered.
    """
    _check_pool(pool)
    return [
        Registered(str(deployment.apply(work_pool_name=pool)), deployment.full_name, str(deployment.entrypoint))
        for deployment in deployments
    ]


def deploy(  # noqa: PLR0913 - the options of the command
    *flows: Annotated[FlowName, Parameter(help="The flows to register. None: all of them.", negative=())],
    pool: Annotated[str, Parameter(help="The work pool whose workers run them.")],
    bucket: Annotated[
        str | None, Parameter(help="Default bucket: s3://name/prefix, or the name of a saved Image Bucket block.")
    ] = None,
    credentials: Annotated[
        str | None,
        Parameter(
            help="Default account: the name of a saved AIMLAPI Credentials block. None: AIMLAPI_KEY of the worker."
        ),
    ] = None,
    name: Annotated[
        str, Parameter(help="Name of the deployments. That of publish_shard is always `worker`.")
    ] = ON_DEMAND,
    tag: Annotated[tuple[str, ...], Parameter(help="A tag beside `flux`. May be repeated.", negative=())] = (),
    json: Annotated[bool, Parameter(help="Print what was registered as one JSON object.", negative=())] = False,
) -> int:
    """Register the flows that ship as deployments on a work pool.

    Workers need the package installed and nothing else: no checkout and no pull step. The same command again updates
    the deployments in place; schedules, limits and job variables that were added to them stay.
    """
    chosen = flows or cast("tuple[FlowName, ...]", get_args(FlowName))
    deployments = [
        make_deployment(each, pool=pool, name=name, bucket=bucket, credentials=credentials, tags=tag)
        for each in dict.fromkeys(chosen)
    ]
    try:
        registered = register(deployments, pool)
    except NotDeployable as error:
        print(error, file=sys.stderr)
        return MISUSED
    if json:
        print(json_format.dumps({"pool": pool, "deployments": [asdict(each) for each in registered]}))
        return 0
    width = max(len(each.name) for each in registered)
    for each in registered:
        print(f"{each.name:{width}}  {each.entrypoint}")
    print(f"\nStart a worker:  prefect worker start --pool '{pool}'")
    print(f"Start a run:     prefect deployment run '{registered[0].name}' --param NAME=VALUE, or from the UI")
    return 0


def _check_pool(pool: str) -> WorkPool:
    if not PREFECT_API_URL.value():
        raise NotDeployable(
            "PREFECT_API_URL is not set, and deployments need a Prefect server that stays. Start one with "
            "`prefect server start`, then: prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    with get_client(sync_client=True) as client:
        try:
            return client.read_work_pool(pool)
        except ObjectNotFound:
            raise NotDeployable(
                f"There is no work pool {pool!r} on {PREFECT_API_URL.value()}. "
                f"Make one: prefect work-pool create '{pool}' --type process"
            ) from None
