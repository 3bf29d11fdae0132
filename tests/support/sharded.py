"""What the tests of batches in shards have in common: rows, what was paid, and what is left in the bucket."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.manifest.report import BatchReport
from flux_prefect.sandbox.launching import RunningSandbox

from .team import Team

SHARD = "publish-shard/worker"
LOST_AFTER = 8.0
"""Seconds. The tests wait for it."""


def make_rows(number: int) -> list[dict[str, Any]]:
    """Requests that no other test makes, half of them without a seed."""
    lot = uuid4().hex
    return [{"id": f"row-{n}", "prompt": f"{lot} {n}", **({"seed": n} if n % 2 else {})} for n in range(1, number + 1)]


def write_table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of them."""
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


async def read_latest(bucket: ImageBucket) -> list[dict[str, Any]]:
    """The records of the latest manifest."""
    content = await bucket.read_path("manifests/latest.jsonl")
    return [json.loads(line) for line in content.splitlines()]


async def list_adoptions(bucket: ImageBucket) -> list[str]:
    """What shows that batches are at work."""
    return [key for key in await bucket.list_keys(most=10_000) or () if "/manifests/sharded/" in key]


def shard_runs(team: Team, report: BatchReport) -> list[FlowRun]:
    """The runs of a batch's shards."""
    batch = str(report.manifest).split("/")[-2]
    return [run for run in team.runs(SHARD) if f"flux-batch-{batch}" in run.tags]


def billed(sandbox: RunningSandbox) -> Counter[str]:
    """How often each prompt was paid for."""
    return Counter(str(row.prompt) for row in sandbox.control.ledger().rows if row.billed)
