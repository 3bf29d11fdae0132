"""A Prefect server on Postgres, where its binaries are installed (Debian: apt install postgresql)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.postgres import NoPostgres, Postgres, find_binaries, start_postgres
from support.leaks import KEYS
from support.missing import do_without
from support.team import ROOT, Team, start_team

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.manifest.report import BatchReport
from flux_prefect.sandbox.launching import RunningSandbox

IMAGES = 12


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A Postgres with an empty database."""
    try:
        find_binaries()
    except NoPostgres as error:
        do_without(error)
    with start_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def team(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A Prefect server on it."""
    home = tmp_path_factory.mktemp("server") / "home"
    settings = {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT_API_DATABASE_CONNECTION_URL": postgres.url}
    with start_team(home, settings) as team:
        yield team
        assert list(home.glob("*.db")) == []  # nothing of it went to SQLite


def _wait_for_count(postgres: Postgres, query: str, least: int) -> int:
    """Task runs come to the database by way of events, some seconds later."""
    end = time.monotonic() + 60
    while (count := int(postgres.run("psql", "-Atc", query))) < least and time.monotonic() < end:
        time.sleep(0.5)
    return count


def _publish(table: Path, bucket: ImageBucket, team: Team) -> BatchReport:
    """In a process of its own, which has sent all of its logs and events when it ends."""
    report = table.with_suffix(".report.json")
    command = [
        "flux_prefect.cli",
        "publish",
        "batch",
        str(table),
        "--bucket",
        bucket.uri,
        "--density",
        "steps",
        "--report",
        str(report),
    ]
    subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PREFECT_API_URL": team.url},
        check=True,
        capture_output=True,
    )
    content = json.loads(report.read_text(encoding="utf-8"))
    return BatchReport.model_validate({name: value for name, value in content.items() if name != "items"})


def test_a_batch_is_published_once_on_postgres(
    postgres: Postgres, team: Team, sandbox: RunningSandbox, bucket: ImageBucket, tmp_path: Path
) -> None:
    """A dozen images in steps are three dozen task runs in Postgres; again, they cost no call. No key is in it."""
    table = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"a harbour on postgres, {bucket.prefix}", "seed": seed} for seed in range(1, IMAGES + 1)]
    table.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    first = _publish(table, bucket, team)
    second = _publish(table, bucket, team)

    assert (first.counts, first.billed_calls) == ({"published": IMAGES}, IMAGES)
    assert (second.counts, second.calls) == ({"unchanged": IMAGES}, 0)
    assert sandbox.control.summary().calls == IMAGES
    completed = "select count(*) from {} where state_type = 'COMPLETED'"
    assert _wait_for_count(postgres, completed.format("task_run"), 3 * IMAGES) == 3 * IMAGES
    assert postgres.run("psql", "-Atc", completed.format("flow_run")) == "2"
    dump = postgres.run("pg_dump")
    assert "generate-image" in dump
    assert [key for key in KEYS if key in dump] == []
