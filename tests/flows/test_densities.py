"""One task run a step, or one for a hundred rows: the same objects, records and money."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from support.nursery import Nursery
from support.waiting import wait_for

from flux_prefect.batch.engine import MAX_ROWS_IN_STEPS, choose_density
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.plan import Plan
from flux_prefect.pipeline import Density
from flux_prefect.sandbox.launching import RunningSandbox

DENSITIES: tuple[Density, ...] = ("steps", "chunks")


@dataclass(frozen=True)
class Outcome:
    """What a batch left behind."""

    statuses: list[str]
    records: list[dict[str, Any]]
    objects: dict[str, str]
    summary: tuple[int, int, int]
    reported: tuple[int, int, float]
    task_runs: int


class Stage:
    """A bucket's prefix, a spool and Prefect results of its own for each batch, so that none finds another's."""

    def __init__(self, sandbox: RunningSandbox, bucket: ImageBucket, account: AimlApiCredentials, folder: Path) -> None:
        self._sandbox, self._bucket, self._account, self._folder = sandbox, bucket, account, folder

    def bucket(self, name: str) -> ImageBucket:
        """The bucket of the batches of this name."""
        return self._bucket.model_copy(update={"prefix": f"{self._bucket.prefix}/{name}"})

    async def publish(self, name: str, rows: list[dict[str, Any]], density: Density) -> Outcome:
        """Run a batch against a ledger and faults set anew."""
        bucket, folder = self.bucket(name), self._folder / name
        self._sandbox.control.reset()
        for fault, times in (("flagged", None), ("server_error", 1), ("moderation", None)):
            self._sandbox.control.inject(fault, times=times, prompt_contains=fault)
        with (
            pytest.MonkeyPatch.context() as patch,
            temporary_settings({PREFECT_LOCAL_STORAGE_PATH: folder / "results"}),
        ):
            patch.setenv("FLUX_PREFECT_SPOOL", str(folder / "spool"))
            report = await publish_batch(rows, bucket, self._account, density=density, max_failed=len(rows))
        totals = self._sandbox.control.summary()
        assert report.records is not None
        lines = report.records.read_text(encoding="utf-8").replace(bucket.prefix, "prefix").splitlines()
        records = sorted((json.loads(line) for line in lines), key=lambda record: int(record["row"]))
        return Outcome(
            statuses=[record["status"] for record in records],
            records=[_without_run(record) for record in records],
            objects=_read_objects(bucket),
            summary=(totals.calls, totals.billed_calls, totals.credits),
            reported=(report.calls, report.billed_calls, report.credits_used),
            task_runs=await _count_task_runs(UUID(records[0]["run"])),
        )


@pytest.fixture
def stage(sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, tmp_path: Path) -> Stage:
    """Where batches run apart from each other."""
    return Stage(sandbox, bucket, credentials, tmp_path)


@pytest.mark.usefixtures("prefect_server")
async def test_both_give_the_same(stage: Stage) -> None:
    """Statuses, bytes, keys, records, calls and costs, also of what goes wrong; only the task runs differ."""
    name = uuid4().hex
    good = [{"id": f"good {seed}", "prompt": f"good {name}", "seed": seed, "shelf": seed} for seed in (1, 2, 3)]
    rows: list[dict[str, Any]] = [
        *good,
        {"id": "invalid", "prompt": "x", "guidance_scale": 21},
        {**good[0], "id": "repeat"},
        *({"id": fault, "prompt": f"{fault} {name}", "seed": 9} for fault in ("flagged", "server_error", "moderation")),
        {"id": "two", "prompt": f"two {name}", "seed": 5, "num_images": 2, "output_format": "png"},
    ]
    steps, chunks = [await stage.publish(density, rows, density) for density in DENSITIES]

    assert steps.statuses == [
        *("published", "published", "published", "invalid", "unchanged", "flagged", "published", "failed", "published")
    ]
    assert steps.objects == chunks.objects
    assert len([key for key in steps.objects if not key.endswith(".json")]) == 6
    assert steps.records == chunks.records
    assert (steps.summary, steps.reported) == (chunks.summary, chunks.reported)
    assert steps.summary[:2] == steps.reported[:2] == (8, 6)
    # Three an image; two where it was flagged, one where it was refused; of two images five.
    assert (steps.task_runs, chunks.task_runs) == (4 * 3 + 2 + 1 + 5, 1)


@pytest.mark.usefixtures("prefect_server")
async def test_what_is_published_needs_no_task_run(stage: Stage) -> None:
    """Not even for a chunk; and a chunk is a hundred rows."""
    rows = [{"prompt": uuid4().hex, "seed": 1} for _ in range(3)]
    first = await stage.publish("again", rows, "chunks")
    second = await stage.publish("again", rows, "chunks")

    assert (first.task_runs, second.task_runs) == (1, 0)
    assert second.statuses == ["unchanged"] * 3
    assert second.objects == first.objects
    assert second.summary[0] == 0


@pytest.mark.parametrize(("first", "then"), [DENSITIES, DENSITIES[::-1]], ids=["steps-chunks", "chunks-steps"])
def test_a_killed_batch_is_finished_in_the_other_density(
    nursery: Nursery, sandbox: RunningSandbox, bucket: ImageBucket, tmp_path: Path, first: Density, then: Density
) -> None:
    """Nothing is paid for twice but what was in flight at the kill, and each such call is noted."""
    sandbox.control.settings(latency=0.5, fast=True, fast_bytes=20_000)
    spool, table = Spool(tmp_path / "spool"), tmp_path / "prompts.jsonl"
    name = uuid4().hex
    table.write_text("\n".join(json.dumps({"prompt": f"{name} {seed}", "seed": seed}) for seed in range(1, 13)))
    order = (str(table), "--bucket", bucket.uri, "--max-in-flight", "3", "--density")
    killed = nursery.start(tmp_path / "killed", *order, first, FLUX_PREFECT_SPOOL=str(spool.root))
    wait_for(lambda: sandbox.control.summary().billed_calls >= 5 and len(spool.open_calls()) > 0)
    killed.kill()
    noted = {call.client_request_id for call in spool.open_calls()}
    counts = nursery.start(tmp_path / "then", *order, then, FLUX_PREFECT_SPOOL=str(spool.root)).finish()

    assert counts.get("published", 0) + counts.get("unchanged", 0) == 12
    assert sum(key.endswith(".jpg") for key in _read_objects(bucket)) == 12
    paid = Counter(row.prompt for row in sandbox.control.ledger().rows if row.billed)
    assert len(paid) == 12
    assert len(noted) <= 2 * 3  # three on the wire, and three whose answers were being written
    again = [row.client_request_id for row in sandbox.control.ledger().rows if row.billed and paid[row.prompt] > 1]
    assert paid.total() - 12 == len(noted.intersection(again))


@pytest.mark.parametrize(
    ("requests", "paid", "density"),
    [
        (0, 0, "steps"),
        (MAX_ROWS_IN_STEPS, 0, "steps"),
        (MAX_ROWS_IN_STEPS + 1, 0, "chunks"),
        (1, MAX_ROWS_IN_STEPS, "chunks"),
    ],
)
def test_a_batch_chooses_by_what_is_to_be_done(requests: int, paid: int, density: Density) -> None:
    """What is published, invalid or repeated needs no task run, however many rows there are."""
    plan = Plan(
        rows=100_000,
        invalid=50_000,
        published=40_000,
        repeats=5_000,
        paid=paid,
        requests=requests,
        images=requests,
        most_credits=0,
        max_credits=None,
        max_images=None,
    )
    assert choose_density(plan) == density


def _without_run(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what is its run's own: the run, times, and the names drawn in it."""
    text = json.dumps({name: value for name, value in record.items() if name != "run"})
    text = re.sub(r'"published_at": "[^"]*"', '"published_at": ""', text)
    text = re.sub(r"fp-[0-9a-f]{32}(\.[0-9a-f]{16})?", "fp", text)
    masked = json.loads(re.sub(r"\.[0-9a-f]{16}\.json", ".json", text))
    assert isinstance(masked, dict)
    return masked


def _read_objects(bucket: ImageBucket) -> dict[str, str]:
    """The keys below the prefix but for manifests, and the SHA-256 of the images."""
    client, found = bucket.get_client(), {}
    for entry in client.list_objects_v2(Bucket="images", Prefix=bucket.prefix)["Contents"]:
        key = entry["Key"].removeprefix(f"{bucket.prefix}/")
        if key.endswith(".json"):
            found[re.sub(r"\.[0-9a-f]{16}\.json", ".json", key)] = ""
        elif not key.startswith("manifests/"):
            found[key] = client.head_object(Bucket="images", Key=entry["Key"])["Metadata"]["flux-sha256"]
    return found


async def _count_task_runs(flow_run: UUID) -> int:
    """Return the number of a flow run's task runs on the server, once all of them have arrived."""
    counts = [-1]
    async with get_client() as client:
        for _ in range(60):
            runs = await client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])))
            counts.append(len(runs))
            if counts[-4:] == [counts[-1]] * 4:  # task runs arrive as events, a moment later
                break
            await asyncio.sleep(0.3)
    return counts[-1]
