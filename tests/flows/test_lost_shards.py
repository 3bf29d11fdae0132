"""A shard whose worker dies with its machine: kill -9 of a real worker and of all that it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest
from benchmarks.hosts import Host, deploy_shard
from pydantic import SecretStr
from support.sharded import LOST_AFTER, billed, make_rows, read_latest, shard_runs
from support.team import Team
from support.waiting import wait_for

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.flows.publish_sharded import publish_sharded
from flux_prefect.sandbox.launching import RunningSandbox


@pytest.fixture
def team(prefect_server: str) -> Iterator[Team]:
    """The server, with what runs a shard deployed on it."""
    deploy_shard(prefect_server)
    team = Team(prefect_server)
    with team.client:
        yield team


@pytest.fixture
def hosts(team: Team, sandbox: RunningSandbox, tmp_path: Path) -> Iterator[list[Host]]:
    """Two machines at work, with a bucket as the place of Prefect's results."""
    results = f"results-{uuid4().hex}"
    ImageBucket(
        bucket_name="images",
        prefix=results,
        endpoint_url=sandbox.environment["AWS_ENDPOINT_URL_S3"],
        region_name="us-east-1",
        aws_access_key_id=sandbox.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=SecretStr(sandbox.environment["AWS_SECRET_ACCESS_KEY"]),
    ).save(results)
    environment = {
        **team.environment,
        **sandbox.environment,
        "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": f"image-bucket/{results}",
    }
    with ExitStack() as stack:
        made = []
        for name in ("north", "south"):
            (tmp_path / name).mkdir()
            made.append(Host(tmp_path / name, environment))
            stack.callback(made[-1].kill)
            made[-1].start()
        yield made


@pytest.mark.timeout(240)
async def test_a_killed_worker_costs_no_image(
    team: Team, sandbox: RunningSandbox, bucket: ImageBucket, hosts: list[Host]
) -> None:
    """Its shard is started again elsewhere; only calls in flight can be paid for again; its page reports the loss.

    It is killed during its first call, which takes three seconds, so that it can't have ended before.
    """
    sandbox.control.settings(latency=3.0, fast=True, fast_bytes=20_000)
    rows = make_rows(12)

    def strike() -> Host:
        struck = wait_for(lambda: next((host for host in hosts if host.spool.open_calls()), None), seconds=120)
        struck.kill()
        sandbox.control.settings(latency=0.3)
        return struck

    killing = asyncio.create_task(asyncio.to_thread(strike))
    report = await publish_sharded(
        rows, bucket.uri, rows_a_shard=6, at_once=2, max_in_flight=4, lost_after_seconds=LOST_AFTER
    )
    noted = (await killing).spool.open_calls()
    paid = billed(sandbox)

    assert report.counts == {"published": 12}
    assert [record["row"] for record in await read_latest(bucket)] == list(range(1, 13))
    assert set(paid) == {row["prompt"] for row in rows}
    assert paid.total() - 12 <= len(noted) <= 4
    assert report.billed_calls <= paid.total()
    assert "Lost" in {run.state_name for run in shard_runs(team, report)}
