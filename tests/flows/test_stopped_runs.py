"""Batches that are stopped while they pay: by a signal, by Ctrl-C, and by Prefect."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling
from support.nursery import Batch, Nursery
from support.waiting import wait_for

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.cli.exit_status import INTERRUPTED
from flux_prefect.display.events import BATCH_FINISHED
from flux_prefect.host.spool import Spool
from flux_prefect.sandbox.launching import RunningSandbox

ROOT = Path(__file__).parents[2]
SERVE = """
from prefect import serve
from flux_prefect.flows.publish_batch import publish_batch
serve(publish_batch.to_deployment("stopped"))
"""
ROWS, AT_ONCE = 12, 4


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Requests that no other test makes."""
    name = uuid4().hex
    return [{"id": f"row-{number}", "prompt": f"{name} {number}", "seed": number + 1} for number in range(ROWS)]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """The spool of the batches."""
    return Spool(tmp_path / "spool")


@pytest.fixture
def slow(sandbox: RunningSandbox) -> RunningSandbox:
    """A service that takes two seconds."""
    sandbox.control.settings(latency=2.0, fast=True, fast_bytes=20_000)
    return sandbox


class Command:
    """The same batch as a command that can be given again."""

    def __init__(self, nursery: Nursery, folder: Path, rows: list[dict[str, Any]], bucket: ImageBucket) -> None:
        self._nursery, self._folder, self._bucket = nursery, folder, bucket
        self._table = folder / "prompts.jsonl"
        self._table.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    def start(self, density: str = "chunks", **environment: str) -> Batch:
        """Start it."""
        return self._nursery.start(
            self._folder / uuid4().hex,
            *(str(self._table), "--bucket", self._bucket.uri, "--density", density),
            *("--max-in-flight", str(AT_ONCE)),
            FLUX_PREFECT_SPOOL=str(self._folder / "spool"),
            **environment,
        )


@pytest.fixture
def command(nursery: Nursery, tmp_path: Path, rows: list[dict[str, Any]], bucket: ImageBucket) -> Command:
    """The batch of the rows."""
    return Command(nursery, tmp_path, rows, bucket)


def read_records(bucket: ImageBucket) -> list[dict[str, Any]]:
    """The lines of the run's manifest in the bucket, which is closed: it is the latest one too."""
    client = bucket.get_client()
    (key,) = [key for key in list_keys(bucket) if key.endswith("/manifest.jsonl")]
    own = client.get_object(Bucket="images", Key=key)["Body"].read()
    assert client.get_object(Bucket="images", Key=f"{bucket.prefix}/manifests/latest.jsonl")["Body"].read() == own
    return [json.loads(line) for line in own.splitlines()]


def check_ended_in_order(bucket: ImageBucket, sandbox: RunningSandbox, spool: Spool) -> UUID:
    """What was in flight is published, the rest is reported row by row, nothing is owed; the flow run's id."""
    records = read_records(bucket)
    published = [record for record in records if record["status"] == "published"]
    assert [record["row"] for record in records] == list(range(1, ROWS + 1))
    assert len(published) == AT_ONCE
    assert {(record["status"], record["error"]) for record in records if record not in published} == {
        ("failed", "RunStopped")
    }
    assert count_images(bucket) == AT_ONCE
    assert sandbox.control.summary().calls == AT_ONCE
    assert spool.open_calls() == []
    return UUID(records[0]["run"])


async def read_outcomes(bucket: ImageBucket) -> list[tuple[str, int]]:
    """The outcome and the billed calls in each event of an end, which the stopped process has sent itself."""
    async with get_client() as client:
        for _ in range(100):
            chosen = EventFilter(
                event=EventNameFilter(name=[BATCH_FINISHED]), resource=EventResourceFilter(id_prefix=[bucket.uri])
            )
            if ends := (await client.read_events(chosen, limit=50)).events:
                return [(end.resource["flux.outcome"], end.payload["billed_calls"]) for end in ends]
            await asyncio.sleep(0.1)
    return []


def list_keys(bucket: ImageBucket) -> list[str]:
    """All that is below the bucket's prefix."""
    listed = bucket.get_client().list_objects_v2(Bucket="images", Prefix=bucket.prefix)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def count_images(bucket: ImageBucket) -> int:
    """How many images are in the bucket."""
    return sum(key.endswith(".jpg") for key in list_keys(bucket))


@pytest.mark.parametrize(
    ("number", "density", "status"),
    [(signal.SIGTERM, "chunks", -signal.SIGTERM), (signal.SIGINT, "steps", INTERRUPTED)],
    ids=["sigterm-chunks", "ctrl-c-steps"],
)
async def test_a_signal_ends_a_batch_in_order(
    slow: RunningSandbox,
    bucket: ImageBucket,
    spool: Spool,
    command: Command,
    number: signal.Signals,
    density: str,
    status: int,
) -> None:
    """Calls in flight are awaited and published, nothing new is sent, the manifest has every row once."""
    batch = command.start(density)
    wait_for(lambda: len(spool.open_calls()) == AT_ONCE)
    batch.signal(number)

    assert batch.wait() == status, batch.said
    run = check_ended_in_order(bucket, slow, spool)
    async with get_client() as client:
        assert (await read(client, run)).is_crashed()
    assert await read_outcomes(bucket) == [("crashed", AT_ONCE)]


@pytest.mark.parametrize("density", ["chunks", "steps"])
def test_a_grace_that_is_too_short_loses_no_account(
    slow: RunningSandbox, bucket: ImageBucket, spool: Spool, command: Command, density: str
) -> None:
    """Calls that nobody awaits any more are noted with their rows; the same again pays for nothing else twice."""
    batch = command.start(density, FLUX_PREFECT_GRACE_SECONDS="0.2")
    wait_for(lambda: len(spool.open_calls()) == AT_ONCE)
    batch.signal(signal.SIGTERM)
    assert batch.wait() == -signal.SIGTERM, batch.said
    noted = {call.client_request_id for call in spool.open_calls()}
    assert len(noted) == AT_ONCE
    records = read_records(bucket)
    assert [record["row"] for record in records] == list(range(1, ROWS + 1))
    assert {(record["status"], record["error"]) for record in records} == {("failed", "RunStopped")}
    assert {call for record in records for call in record["possibly_billed"]} == noted
    wait_for(lambda: slow.control.summary().in_flight == 0)

    slow.control.settings(latency=0.0)
    assert command.start().finish() == {"published": ROWS}
    assert count_images(bucket) == ROWS
    bills = [row for row in slow.control.ledger().rows if row.billed]
    assert len({row.prompt for row in bills}) == ROWS
    assert len(bills) - ROWS == len([row for row in bills if row.client_request_id in noted])


@pytest.fixture
def served(prefect_server: str, slow: RunningSandbox, spool: Spool) -> Iterator[None]:
    """A process that serves the flow."""
    environment = {
        **os.environ,
        **slow.environment,
        "PREFECT_API_URL": prefect_server,
        "FLUX_PREFECT_SPOOL": str(spool.root),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        yield
        process.kill()  # its own orderly end would take seconds, and it has nothing left to end


@pytest.mark.usefixtures("served")
async def test_a_run_cancelled_in_prefect_ends_in_order_and_cancelled(
    slow: RunningSandbox, bucket: ImageBucket, spool: Spool, rows: list[dict[str, Any]]
) -> None:
    """As from the UI's button: its images in flight are published, and it never counts as crashed."""
    slow.control.settings(latency=3.0)
    parameters = {"source": rows, "bucket": bucket.uri, "max_in_flight": AT_ONCE}
    async with get_client() as client:
        run = await start(client, "publish-batch/stopped", parameters)
        await asyncio.to_thread(wait_for, lambda: len(spool.open_calls()) == AT_ONCE)
        await client.set_flow_run_state(run, Cancelling())
        for _ in range(300):
            state = await read(client, run)
            if state.is_final():
                break
            await asyncio.sleep(0.1)
        names = [passed.name for passed in await client.read_flow_run_states(run)]

    assert state.is_cancelled(), state
    assert names[-3:] == ["Running", "Cancelling", "Cancelled"]
    assert check_ended_in_order(bucket, slow, spool) == run
    assert await read_outcomes(bucket) == [("cancelled", AT_ONCE)]


async def start(client: PrefectClient, deployment: str, parameters: dict[str, Any]) -> UUID:
    """Start a run of a deployment as soon as there is one."""
    for _ in range(300):
        try:
            found = await client.read_deployment_by_name(deployment)
        except ObjectNotFound:
            await asyncio.sleep(0.1)
        else:
            return (await client.create_flow_run_from_deployment(found.id, parameters=parameters)).id
    raise AssertionError("the deployment never came")


async def read(client: PrefectClient, run: UUID) -> State[Any]:
    """The state of a flow run, as the server has it."""
    state = (await client.read_flow_run(run)).state
    assert state is not None
    return state
