"""Batches in shards over two machines that share nothing but the bucket and Prefect's server.

What becomes of them when the batch dies, when it is stopped, and when the money ends. Of a machine that dies:
test_lost_shards.py.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from benchmarks.hosts import deploy_shard
from prefect.states import Cancelling
from support.nursery import Batch, Nursery
from support.shard_runner import ShardRunner
from support.sharded import (
    LOST_AFTER,
    SHARD,
    billed,
    list_adoptions,
    make_rows,
    read_latest,
    shard_runs,
    write_table,
)
from support.team import Team
from support.waiting import wait_for

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.flows.publish_sharded import publish_sharded
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.sharding.shards import assign_shard

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def team(prefect_server: str) -> Iterator[Team]:
    """The server, with what runs a shard deployed on it."""
    deploy_shard(prefect_server)
    team = Team(prefect_server)
    with team.client:
        yield team


@pytest.fixture(scope="module")
def machines(
    team: Team, running_sandbox: RunningSandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ShardRunner]:
    """Two machines that run the shards."""
    environment = {**team.environment, **running_sandbox.environment}
    with ShardRunner(team.url, team.find(SHARD).id, environment, tmp_path_factory.mktemp("machines")) as runner:
        yield runner


@pytest.fixture
def service(sandbox: RunningSandbox) -> RunningSandbox:
    """A service whose images are quickly drawn."""
    sandbox.control.settings(latency=0.3, fast=True, fast_bytes=20_000)
    return sandbox


Command = Callable[..., Batch]


@pytest.fixture
def command(nursery: Nursery, service: RunningSandbox, tmp_path: Path, bucket: ImageBucket) -> Command:  # noqa: ARG001 - it must be up
    """Starts a batch into this test's bucket, on a machine of its own."""

    def start(table: Path, *options: str) -> Batch:
        return nursery.start(
            tmp_path / "parent",
            *(str(table), "--bucket", bucket.uri, "--lost-after-seconds", f"{LOST_AFTER:g}"),
            *options,
            command="sharded",
            FLUX_PREFECT_SPOOL=str(tmp_path / "parent" / "spool"),
            FLUX_PREFECT_LOCKS=str(tmp_path / "parent" / "locks"),
        )

    return start


@pytest.mark.usefixtures("machines")
async def test_sixty_rows_over_two_workers(team: Team, service: RunningSandbox, bucket: ImageBucket) -> None:
    """Each is paid for once, repeats with it; the manifest has every row once; a second call finds all of it there."""
    rows = make_rows(60)
    rows[1]["seed"] = 2
    table = [*rows, {"id": "bad", "prompt": ""}, {**rows[0], "id": "again"}, {**rows[1], "id": "once more"}]

    report = await publish_sharded(
        table, bucket.uri, rows_a_shard=15, max_in_flight=16, max_failed=1, lost_after_seconds=30
    )
    records = await read_latest(bucket)

    assert report.counts == {"published": 60, "unchanged": 2, "invalid": 1}
    assert (report.billed_calls, report.calls) == (60, 60)
    assert billed(service) == Counter({row["prompt"]: 1 for row in rows})
    assert [record["id"] for record in records] == [row["id"] for row in table]
    assert [record["row"] for record in records] == list(range(1, 64))
    assert len(shard_runs(team, report)) == 4
    assert {run.state_name for run in shard_runs(team, report)} == {"Completed"}
    assert await list_adoptions(bucket) == []

    seeded = [row for row in table if "seed" in row]
    again = await publish_sharded(seeded, bucket.uri, lost_after_seconds=30)
    assert again.counts == {"unchanged": len(seeded)}
    assert shard_runs(team, again) == []


@pytest.mark.usefixtures("machines")
async def test_a_killed_batch_goes_on_where_it_is_started_again(
    team: Team, service: RunningSandbox, command: Command, bucket: ImageBucket, tmp_path: Path
) -> None:
    """On another machine, too. Its shards never noticed: none is started again, and the seeds that it drew hold."""
    service.control.settings(latency=1.0)
    rows = make_rows(20)
    table = write_table(tmp_path, rows)
    batch = command(table, "--rows-a-shard", "10", "--max-in-flight", "2")
    wait_for(lambda: service.control.summary().billed_calls >= 4)
    batch.kill()
    report = await publish_sharded(str(table), bucket.uri, lost_after_seconds=LOST_AFTER)

    assert report.counts == {"published": 20}
    assert [item.row for item in report.items] == list(range(1, 21))
    assert billed(service) == Counter({row["prompt"]: 1 for row in rows})
    assert len(shard_runs(team, report)) == 2


@pytest.mark.usefixtures("machines")
async def test_a_cap_holds_over_all_shards_and_is_used_up(
    team: Team, service: RunningSandbox, bucket: ImageBucket
) -> None:
    """What one shard leaves of its share, as all of its rows fail for nothing, another one gets in a further round."""
    lot = uuid4().hex
    shards: tuple[list[dict[str, Any]], ...] = ([], [])
    for seed in range(1, 200):
        request = ImageRequest(prompt=f"{lot} {seed}.", seed=seed)
        own = shards[assign_shard(request.fingerprint(service.url), 2)]
        own.append({"prompt": request.prompt, "seed": seed})
    failing, others = shards[0][:6], shards[1][:10]
    for row in failing:
        service.control.inject("moderation", times=1, prompt_contains=row["prompt"])

    report = await publish_sharded(
        [*failing, *others], bucket.uri, rows_a_shard=8, max_images=8, max_failed=6, lost_after_seconds=30
    )

    assert report.counts == {"published": 8, "skipped_budget": 2, "failed": 6}
    assert service.control.summary().billed_images == 8
    assert len(shard_runs(team, report)) == 3
    assert len(await read_latest(bucket)) == 16


@pytest.mark.usefixtures("machines")
async def test_a_cancelled_batch_stops_its_shards_and_can_be_taken_up(
    team: Team, service: RunningSandbox, command: Command, bucket: ImageBucket, tmp_path: Path
) -> None:
    """What was in flight is published; the same call does the rest, and pays for nothing again."""
    service.control.settings(latency=1.0)
    rows = make_rows(10)
    table = write_table(tmp_path, rows)
    batch = command(table, "--max-in-flight", "1")
    wait_for(lambda: service.control.summary().billed_calls >= 2)
    batches = [run for run in team.client.read_flow_runs() if run.deployment_id is None]
    run = max(batches, key=lambda run: str(run.created))
    team.client.set_flow_run_state(run.id, Cancelling())
    batch.signal(signal.SIGTERM)  # as Prefect's runner does
    batch.wait()
    paid = service.control.summary().billed_calls
    assert team.client.read_flow_run(run.id).state_name == "Cancelled"
    assert 2 <= paid < 10
    assert Counter(record["status"] for record in await read_latest(bucket)) == {"published": paid, "failed": 10 - paid}
    report = await publish_sharded(str(table), bucket.uri, lost_after_seconds=LOST_AFTER)

    assert report.counts == {"published": 10}
    assert report.billed_calls == 10
    assert billed(service) == Counter({row["prompt"]: 1 for row in rows})


@pytest.mark.usefixtures("machines")
async def test_a_limit_over_all_workers_follows_what_the_service_takes(
    team: Team, service: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials
) -> None:
    """It is made as wide as was asked for, and grows narrower with the service; each image is paid for once."""
    service.control.settings(latency=1.0, max_in_flight=3)
    name = f"limit-{uuid4().hex[:8]}"
    saved = credentials.model_copy(update={"concurrency_limit": name})
    await saved.asave(name)
    rows = make_rows(40)
    sizes: list[int] = []

    async def watch() -> None:
        while True:
            found = [limit for limit in team.client.read_global_concurrency_limits() if limit.name == name]
            sizes.extend(limit.limit for limit in found)
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    report = await publish_sharded(
        rows, bucket.uri, name, rows_a_shard=20, at_once=2, max_in_flight=12, lost_after_seconds=30
    )
    watching.cancel()

    assert report.counts == {"published": 40}
    assert billed(service) == Counter({row["prompt"]: 1 for row in rows})
    assert service.control.summary().peak_in_flight <= 12
    assert sizes[0] == 12
    assert min(sizes) < 12


@pytest.mark.usefixtures("machines")
async def test_two_calls_at_once_are_one_batch(
    team: Team, service: RunningSandbox, command: Command, bucket: ImageBucket, tmp_path: Path
) -> None:
    """The second waits for the first, then reports its result: no row is paid for, or is part of a shard, twice."""
    service.control.settings(latency=1.0)
    rows = [{**row, "seed": n} for n, row in enumerate(make_rows(16), start=1)]
    table = write_table(tmp_path, rows)
    first = command(table, "--rows-a-shard", "8", "--max-in-flight", "4")
    wait_for(lambda: service.control.summary().billed_calls >= 2)
    report = await publish_sharded(str(table), bucket.uri, rows_a_shard=8, lost_after_seconds=LOST_AFTER)
    assert first.wait() == 0, first.said

    assert report.count("published") + report.count("unchanged") == 16
    assert [item.row for item in report.items] == list(range(1, 17))
    assert billed(service) == Counter({row["prompt"]: 1 for row in rows})
    assert len({run.id for run in team.runs(SHARD) if run.parameters["bucket"] == bucket.uri}) == 2
    assert await list_adoptions(bucket) == []


@pytest.mark.usefixtures("team")
async def test_what_no_worker_could_load_is_refused(bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """Blocks that are not saved, and a deployment that is missing, before anything is planned."""
    rows = make_rows(1)
    with pytest.raises(ValueError, match="bucket is a block that is not saved"):
        await publish_sharded(rows, bucket)
    with pytest.raises(ValueError, match="credentials is a block that is not saved"):
        await publish_sharded(rows, bucket.uri, credentials)
    with pytest.raises(ValueError, match="deployment 'publish-shard/nobody' does not exist"):
        await publish_sharded(rows, bucket.uri, deployment="publish-shard/nobody")
