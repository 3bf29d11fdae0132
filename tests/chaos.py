"""A batch that is killed with `kill -9` again and again, and started again until it is done.

`make chaos` runs it long; `test_chaos.py` runs it short. Afterwards every image must be in the bucket, whole, and
nothing may be paid for twice but calls that were in flight at a kill, each of them noted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when the tasks are imported. With pauses of 2 to 60 s, a table's last row would outlive no run.
os.environ.setdefault("FLUX_PREFECT_RETRY_DELAY_SECONDS", "[0]")

from prefect.testing.utilities import prefect_test_harness
from rich.console import Console

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.pipeline import Density
from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox

BUCKET = "s3://images/chaos"
PASSING = ("server_error", "overloaded", "reset_before_work", "cut_download", "reset_download", "download_503")
"""Faults that cost nothing, so that every second payment is the kills' own."""

DENSITIES: tuple[Density, ...] = ("steps", "chunks")
"""What one of them has begun the other goes on with."""


@dataclass(frozen=True)
class Outcome:
    """What was left after the last run."""

    rows: int
    kills: int
    in_flight_at_kills: int
    published: int
    wrong: list[str]
    billed: int
    billed_again: int
    noted: int
    leftovers: list[str]

    def problems(self, max_in_flight: int) -> list[str]:
        """What is not as it must be; empty where all is well."""
        found = []
        if self.published != self.rows:
            found.append(f"{self.published} of {self.rows} images are published")
        if self.wrong:
            found.append(f"wrong bytes in {self.wrong}")
        if self.billed_again > max_in_flight * self.kills:
            found.append(f"{self.billed_again} paid for again, more than were in flight")
        if self.billed_again > self.noted:
            found.append(f"{self.billed_again} paid for again, but only {self.noted} noted as perhaps paid")
        if self.leftovers:
            found.append(f"left behind: {self.leftovers}")
        return found


def run_chaos(folder: Path, *, rows: int, kills: int, max_in_flight: int, seed: int, console: Console) -> Outcome:
    """Kill and restart until there were enough kills; a table that is done before makes room for the next.

    Needs a Prefect API in the environment.
    """
    chance = random.Random(seed)  # noqa: S311 - chooses moments
    os.environ["FLUX_PREFECT_SPOOL"] = str(folder / "spool")
    os.environ["FLUX_PREFECT_REPEAT_UNKNOWN"] = str(kills)  # one row may be in flight at every kill
    tables = [_write_table(folder, rows, f"{seed} 1")]
    done = in_flight = 0
    with start_sandbox(folder / "sandbox", latency=0.5, fast_bytes=20_000) as sandbox:
        os.environ.update(sandbox.environment)
        sandbox.control.settings(fast=True)
        while done < kills:
            sandbox.control.clear_faults()  # what a killed run has left over: a row is tried five times
            sandbox.control.inject(chance.choice(PASSING), times=chance.randint(1, 3))
            child = _start(folder, tables[-1], max_in_flight, chance.choice(DENSITIES))
            status = _ended_within(child, chance.uniform(0.5, 4.0))
            if status == 0:
                tables.append(_write_table(folder, rows, f"{seed} {len(tables) + 1}"))
                continue
            if status is not None:
                raise AssertionError(f"a run that was not killed ended with status {status}: {_log(folder)}")
            in_flight += sandbox.control.summary().in_flight
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            console.print(f"kill {done}: {sandbox.control.summary().billed_calls} billed so far")
        sandbox.control.clear_faults()
        for density in DENSITIES:  # the second finds everything there
            status = os.waitpid(_start(folder, tables[-1], max_in_flight, density), 0)[1]
            if status != 0:
                raise AssertionError(f"a last run, which was not killed, ended with status {status}: {_log(folder)}")
        return _settle(sandbox, folder / "spool", rows * len(tables), done, in_flight)


def _write_table(folder: Path, rows: int, name: str) -> Path:
    table = folder / f"prompts {name}.jsonl"
    lines = [json.dumps({"id": f"row-{n}", "prompt": f"chaos {name} {n}", "seed": n + 1}) for n in range(rows)]
    table.write_text("\n".join(lines), encoding="utf-8")
    return table


def _log(folder: Path) -> str:
    """What the last run said."""
    return (folder / "run.log").read_text(encoding="utf-8", errors="replace")


def _start(folder: Path, table: Path, max_in_flight: int, density: Density) -> int:
    """A process of its own that runs the batch, forked so that it need not import everything again."""
    child = os.fork()
    if child:
        return child
    status = 1
    with contextlib.suppress(BaseException):
        log = os.open(folder / "run.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        batch: Any = publish_batch(
            str(table), BUCKET, max_in_flight=max_in_flight, density=density, return_state=True
        )  # Prefect types what is really a coroutine as the state
        status = 0 if asyncio.run(batch).is_completed() else 1
    os._exit(status)


def _ended_within(child: int, seconds: float) -> int | None:
    """Its status, or None where it still runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    return None


def _settle(sandbox: RunningSandbox, spool: Path, rows: int, kills: int, in_flight: int) -> Outcome:
    bucket = ImageBucket.from_uri(BUCKET)
    client = bucket.get_client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket.bucket_name, Prefix=bucket.prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", []) if entry["Key"].endswith(".jpg")]
    wrong = []
    for key in keys:
        stored = client.get_object(Bucket=bucket.bucket_name, Key=key)
        if hashlib.sha256(stored["Body"].read()).hexdigest() != stored["Metadata"]["flux-sha256"]:
            wrong.append(key)
    paid = Counter(row.prompt for row in sandbox.control.ledger().rows if row.billed)
    return Outcome(
        rows=rows,
        kills=kills,
        in_flight_at_kills=in_flight,
        published=len(keys),
        wrong=wrong,
        billed=sum(paid.values()),
        billed_again=sum(times - 1 for times in paid.values()),
        noted=len(list((spool / "calls").glob("*.json"))),
        leftovers=[str(path) for path in spool.rglob("*.part")],
    )


def main() -> int:
    """The command line; returns the exit status, 0 only where nothing was lost or paid for twice."""
    parser = argparse.ArgumentParser(prog="python tests/chaos.py", description="Kill a batch until it is done.")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--max-in-flight", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args()
    console = Console(highlight=False)
    console.print(f"seed {given.seed}")
    server = contextlib.nullcontext() if "PREFECT_API_URL" in os.environ else prefect_test_harness()
    with tempfile.TemporaryDirectory(prefix="flux_prefect-chaos-") as folder, server:
        outcome = run_chaos(
            Path(folder),
            rows=given.rows,
            kills=given.kills,
            max_in_flight=given.max_in_flight,
            seed=given.seed,
            console=console,
        )
    console.print(outcome)
    problems = outcome.problems(given.max_in_flight)
    for problem in problems:
        console.print(f"[bold red]{problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
