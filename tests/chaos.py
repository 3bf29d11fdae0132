"""A flow run that is killed, stopped, moved to another host and tried again, over and over, until it is done.

`make chaos` runs it long; `test_chaos.py` runs it short. Afterwards every image must be in the bucket, whole; nothing
may be paid for twice but calls that were in flight at a kill or whose answers were lost, each of them noted; and of
each run, report, manifest, event and state must have the sums of the sandbox's own books, to the credit.
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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

# Read when the tasks are imported. With pauses of 2 to 60 s, a table's last row would outlive no run.
os.environ.setdefault("FLUX_PREFECT_RETRY_DELAY_SECONDS", "[0]")

from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry
from prefect.testing.utilities import prefect_test_harness
from rich.console import Console

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.manifest.report import BatchReport
from flux_prefect.pipeline import Density
from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox
from flux_prefect.sandbox.ledger import Call

BUCKET = "s3://images/chaos"
LEASE_SECONDS = 5
FREE = ("server_error", "overloaded", "reset_before_work", "cut_download", "reset_download", "download_503", "gone_403")
"""Faults that cost nothing, so that every second payment is the kills' own."""

LOST = ("reset_after_work", "invalid_json", "html_200")
"""Faults that lose a paid answer: the row may be paid for once more."""

DENSITIES: tuple[Density, ...] = ("steps", "chunks")
"""What one of them has begun the other goes on with."""


@dataclass(frozen=True)
class Outcome:
    """What was left after the last run."""

    rows: int
    kills: int
    hosts: int
    in_flight_at_kills: int
    published: int
    wrong: list[str]
    billed: int
    billed_again: int
    answers_lost: int
    noted: int
    wrong_sums: list[str]
    leftovers: list[str]

    def problems(self) -> list[str]:
        """What is not as it must be; empty where all is well."""
        found = [*self.wrong_sums]
        if self.published != self.rows:
            found.append(f"{self.published} of {self.rows} images are published")
        if self.wrong:
            found.append(f"wrong bytes in {self.wrong}")
        if self.billed_again > self.in_flight_at_kills + self.answers_lost:
            found.append(f"{self.billed_again} paid for again, more than were in flight or lost")
        if self.billed_again > self.noted:
            found.append(f"{self.billed_again} paid for again, but only {self.noted} noted as perhaps paid")
        if self.leftovers:
            found.append(f"left behind: {self.leftovers}")
        return found


@dataclass
class Run:
    """A flow run of a table, over all its attempts."""

    table: Path
    id: UUID
    host: Path
    report: BatchReport | None = None
    attempts: int = field(default=0)

    def start(self, density: Density, max_in_flight: int) -> int:
        """Start the next attempt. It is a process of its own, forked so that it need not import everything again."""
        self.attempts += 1
        child = os.fork()
        if child:
            return child
        status = 1
        with contextlib.suppress(BaseException):
            os.environ["FLUX_PREFECT_SPOOL"] = str(self.host)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            report = asyncio.run(self._attempt(density, max_in_flight))
            self._ended.write_text(report.model_dump_json(), encoding="utf-8")
            status = 0
        os._exit(status)

    async def _attempt(self, density: Density, max_in_flight: int) -> BatchReport:
        """Go on as Prefect does with a run that is to be tried again. Raises where rows are missing."""
        async with get_client() as client:
            await client.set_flow_run_state(self.id, AwaitingRetry(), force=True)
            run = await client.read_flow_run(self.id)
        parameters = publish_batch.validate_parameters(
            {
                "source": str(self.table),
                "bucket": chaos_bucket(),
                "credentials": None,
                "max_in_flight": max_in_flight,
                "density": density,
            }
        )
        attempt: Any = run_flow(publish_batch, flow_run=run, parameters=parameters, return_type="state")
        state = await attempt
        if not state.is_completed():
            raise RuntimeError(state.message)
        report: BatchReport = await state.aresult()
        return report

    def read_report(self) -> None:
        """Read the report of the last attempt, which has ended well."""
        self.report = BatchReport.model_validate_json(self._ended.read_text(encoding="utf-8"))

    def log(self) -> str:
        """What the last attempt said."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def _log(self) -> Path:
        return self.table.with_name(f"{self.id}.log")

    @property
    def _ended(self) -> Path:
        return self.table.with_name(f"{self.id}.json")


def chaos_bucket() -> ImageBucket:
    """The bucket that all hosts share."""
    return ImageBucket.from_uri(BUCKET).model_copy(update={"lease_seconds": LEASE_SECONDS})


class Chaos:
    """Several hosts that work on one table after the other, and are killed.

    Args:
        folder: for tables, spools and logs.
        sandbox: the service and the bucket.
        rows: rows of a table.
        seed: of all that is left to chance.
    """

    def __init__(self, folder: Path, sandbox: RunningSandbox, *, rows: int, max_in_flight: int, seed: int) -> None:
        self._folder = folder
        self._sandbox = sandbox
        self._rows = rows
        self._max_in_flight = max_in_flight
        self._seed = seed
        self._chance = random.Random(seed)  # noqa: S311 - chooses moments
        self._hosts: list[Path] = []
        self._tables: list[Path] = []
        self.runs: list[Run] = []
        self.kills = 0
        self.in_flight = 0

    def work(self, kills: int, console: Console) -> None:
        """Kill and try again until there were enough kills, then let the last table end."""
        ours, rival = self._next_table()
        while self.kills < kills:
            self._arm()
            started = [(run, self._start(run)) for run in self._choose(ours, rival)]
            end = time.monotonic() + self._chance.uniform(2.0, 8.0)
            for run, child in started:
                if _ended_within(child, end) is None:
                    self._stop(child)
                    console.print(f"kill {self.kills}: {self._sandbox.control.summary().billed_calls} billed so far")
                else:
                    self._take_report(run)
            if ours.report is not None:
                ours, rival = self._next_table()
        self._finish(ours)

    def _next_table(self) -> tuple[Run, Run]:
        name = f"{self._seed} {len(self._tables) + 1}"
        table = self._folder / f"prompts {name}.jsonl"
        lines = [
            json.dumps({"id": f"row-{n}", "prompt": f"chaos {name} {n}", "seed": n + 1}) for n in range(self._rows)
        ]
        table.write_text("\n".join(lines), encoding="utf-8")
        self._tables.append(table)
        with get_client(sync_client=True) as client:
            ids = [client.create_flow_run(publish_batch).id for _ in range(2)]
        runs = [Run(table, name, self._new_host()) for name in ids]
        self.runs += runs
        return runs[0], runs[1]

    def _new_host(self) -> Path:
        self._hosts.append(self._folder / f"host-{len(self._hosts) + 1}")
        return self._hosts[-1]

    def _arm(self) -> None:
        self._sandbox.control.clear_faults()  # what a killed run has left over: a row is tried five times
        kinds = LOST if self._chance.random() < 0.2 else FREE
        self._sandbox.control.inject(
            self._chance.choice(kinds), times=1 if kinds is LOST else self._chance.randint(1, 3)
        )

    def _choose(self, ours: Run, rival: Run) -> Iterable[Run]:
        """At times a rival works on the same table, as a run of its own."""
        return (ours, rival) if rival.report is None and self._chance.random() < 0.3 else (ours,)

    def _start(self, run: Run) -> int:
        if self._chance.random() < 0.25:
            run.host = self._new_host()
        return run.start(self._chance.choice(DENSITIES), self._max_in_flight)

    def _stop(self, child: int) -> None:
        """Kill a run, or at times stop it as a worker does whose run was cancelled."""
        self.in_flight += self._sandbox.control.summary().in_flight
        gently = self._chance.random() < 0.2
        os.kill(child, signal.SIGTERM if gently else signal.SIGKILL)
        os.waitpid(child, 0)
        self.kills += 1

    def _take_report(self, run: Run) -> None:
        with contextlib.suppress(FileNotFoundError):  # it failed, as rows did: Prefect would try again
            run.read_report()

    def _finish(self, run: Run) -> None:
        self._sandbox.control.clear_faults()
        for _ in range(3):  # a row that failed before may be in the way once
            os.waitpid(run.start("chunks", self._max_in_flight), 0)
            self._take_report(run)
            if run.report is not None:
                return
        raise AssertionError(f"the last run, which was not killed, did not end well: {run.log()}")

    def outcome(self) -> Outcome:
        """Compare what was left with the service's books."""
        time.sleep(2)  # the sandbox carries out calls whose callers died
        calls = self._sandbox.control.ledger().rows
        paid = Counter(call.prompt for call in calls if call.billed)
        noted = {path.name for host in self._hosts for path in (host / "calls").glob("*.json")}
        published, wrong = _read_images()
        return Outcome(
            rows=self._rows * len(self._tables),
            kills=self.kills,
            hosts=len(self._hosts),
            in_flight_at_kills=self.in_flight,
            published=published,
            wrong=wrong,
            billed=sum(paid.values()),
            billed_again=sum(times - 1 for times in paid.values()),
            answers_lost=sum(call.billed and call.fault in LOST for call in calls),
            noted=len(noted),
            wrong_sums=[problem for run in self.runs if run.report for problem in _compare(run, run.report, calls)],
            leftovers=[str(path) for path in self._folder.rglob("*.part")],
        )


def _compare(run: Run, report: BatchReport, calls: list[Call]) -> Iterable[str]:
    """What report, manifest, event and state say of a run that the service's books don't."""
    own = [call for call in calls if (call.client_request_id or "").startswith(f"fp-{run.id.hex}.")]
    billed = [call for call in own if call.billed and call.client_request_id not in report.possibly_billed]
    books = (len(billed), sum(call.credits for call in billed))
    manifest = [json.loads(line) for line in asyncio.run(_read_manifest(run.id)).splitlines()]
    state, event = asyncio.run(_read_server(run.id))
    told = {
        "report": (report.billed_calls, report.credits_used),
        "manifest": tuple(sum(line[name] for line in manifest) for name in ("billed_calls", "credits_used")),
        "event": (event["billed_calls"], event["credits_used"]),
    }
    for place, sums in told.items():
        if sums != books:
            yield f"{run.id}, {run.attempts} attempts: the {place} has {sums}, the service {books}"
    if books[0] and f"{books[0]:,} calls billed, {books[1]:,} credits" not in state.replace(
        "1 call billed", "1 calls billed"
    ):
        yield f"{run.id}: the state is {state!r}, the service has {books}"


async def _read_manifest(run: UUID) -> str:
    return (await chaos_bucket().read_path(f"manifests/{run}/manifest.jsonl")).decode()


async def _read_server(run: UUID) -> tuple[str, dict[str, Any]]:
    """The message of a run's state, and the payload of its last event."""
    query = {
        "filter": {
            "event": {"name": ["flux.batch.finished"]},
            "resource": {"id": [f"{BUCKET}/manifests/{run}"]},
            "order": "DESC",
        }
    }
    async with get_client() as client:
        state = (await client.read_flow_run(run)).state
        for _ in range(60):
            answer = await client._client.post("/events/filter", json=query)
            found = answer.json()["events"]
            if found and found[0]["payload"]["status"] == "completed":
                return (state.message or "") if state else "", found[0]["payload"]
            await asyncio.sleep(0.5)
    raise AssertionError(f"no event of {run} has arrived")


def _read_images() -> tuple[int, list[str]]:
    bucket = chaos_bucket()
    client = bucket.get_client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket.bucket_name, Prefix=bucket.prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", []) if entry["Key"].endswith(".jpg")]
    wrong = []
    for key in keys:
        stored = client.get_object(Bucket=bucket.bucket_name, Key=key)
        if hashlib.sha256(stored["Body"].read()).hexdigest() != stored["Metadata"]["flux-sha256"]:
            wrong.append(key)
    return len(keys), wrong


def _ended_within(child: int, end: float) -> int | None:
    """Its status, or None where it still runs."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > end:
            return None
        time.sleep(0.02)


def run_chaos(folder: Path, *, rows: int, kills: int, max_in_flight: int, seed: int, console: Console) -> Outcome:
    """Kill and try again until there were enough kills; a table that is done makes room for the next.

    Needs a Prefect API in the environment.
    """
    os.environ["FLUX_PREFECT_REPEAT_UNKNOWN"] = str(2 * kills)  # one row may be in flight at every kill
    os.environ["FLUX_PREFECT_GRACE_SECONDS"] = "5"
    with start_sandbox(folder / "sandbox", latency=0.5, fast_bytes=20_000) as sandbox:
        os.environ.update(sandbox.environment)
        sandbox.control.settings(fast=True)
        chaos = Chaos(folder, sandbox, rows=rows, max_in_flight=max_in_flight, seed=seed)
        chaos.work(kills, console)
        return chaos.outcome()


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
    problems = outcome.problems()
    for problem in problems:
        console.print(f"[bold red]{problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
