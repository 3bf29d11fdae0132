"""One table over 1, 2 and 4 workers, then over four of which one is killed, and the batch itself with it.

All of it runs on one machine: where its cores are busy, more workers can't be faster, and the CPU table shows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from flux_prefect.bucket.image_bucket import ImageBucket

from .contestants.contender import BUCKET, write_table
from .hosts import ROOT, Host, deploy_shard, descendants, own_environment
from .measuring import RunFailed
from .postgres import Postgres, start_postgres
from .processes import cpu_seconds, family_cpu_seconds
from .stage import Stage, open_stage
from .tables import Table

IMAGES = 2_000
IN_FLIGHT_A_WORKER = 16
LOST_AFTER = 30
_LATENCY = 1.0
_WORKERS = (1, 2, 4)
_LONGEST = 3600
_RESULTS = "results"


@dataclass
class _Run:
    """One batch, measured.

    Attributes:
        workers: how many were there.
        seconds: from the command to its end.
        pace: images a second, from the first paid call to the last.
        cpu: seconds by group of processes.
        paid_again: calls paid for beyond one an image.
        at_risk: calls of the killed worker that were in flight.
    """

    workers: int
    seconds: float
    pace: float
    cpu: dict[str, float] = field(default_factory=dict)
    paid_again: int = 0
    at_risk: int = 0


def run(console: Console, *, images: int = IMAGES, postgres: bool = False) -> None:
    """Publish `images` images of a second each with 1, 2 and 4 workers, then with two kills, and print two tables."""
    with start_postgres() if postgres else nullcontext() as database:
        settings = {} if database is None else {"PREFECT_API_DATABASE_CONNECTION_URL": database.url}
        with open_stage(latency=_LATENCY, image_bytes=300_000, server=settings) as stage:
            deploy_shard(stage.prefect.api_url)
            with temporary_settings({PREFECT_API_URL: stage.prefect.api_url}):
                ImageBucket(bucket_name=BUCKET, prefix="results").save(_RESULTS)
            runs = []
            for workers in _WORKERS:
                runs.append(_measure(stage, database, workers, images, lambda team: team.watch()))
                console.print(f"[dim]{workers} workers: {runs[-1].seconds:.0f} s")
            killed = _measure(stage, database, _WORKERS[-1], images, lambda team: team.watch_and_kill())
    _print(console, [*runs, killed], images, "Postgres" if postgres else "SQLite")


class _Team:
    """Machines, and a batch over them that can be started again."""

    def __init__(self, stage: Stage, hosts: list[Host], folder: Path, images: int) -> None:
        self.stage, self.hosts, self.images = stage, hosts, images
        self.at_risk = 0
        self._folder = folder
        self._name = uuid4().hex
        write_table(folder / "table.jsonl", self._name, images)

    @contextmanager
    def start(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the batch; the same each time."""
        in_flight = IN_FLIGHT_A_WORKER * len(self.hosts)
        command = [
            *(sys.executable, "-m", "flux_prefect.cli", "publish", "sharded", str(self._folder / "table.jsonl")),
            *("--bucket", f"s3://{BUCKET}/{self._name}", "--report", str(self._folder / "report.json")),
            *("--at-once", str(len(self.hosts)), "--max-in-flight", str(in_flight)),
            *("--rows-a-shard", str(max(1, self.images // len(self.hosts)))),
            *("--lost-after-seconds", str(LOST_AFTER)),
        ]
        with (self._folder / "said").open("ab") as said:
            batch = subprocess.Popen(
                command,
                cwd=ROOT,
                env=own_environment(self.stage.environment, self._folder),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        with batch:
            try:
                yield batch
            finally:
                batch.kill()

    def watch(self) -> None:
        """Run the batch to its end."""
        with self.start() as batch:
            if batch.wait(_LONGEST):
                raise RunFailed((self._folder / "said").read_text(errors="replace")[-4000:])

    def watch_and_kill(self) -> None:
        """The same, with the busiest worker killed when a quarter is paid for, and the batch itself at half of it."""
        with self.start() as batch:
            self._wait_for(0.25, batch)
            struck = max(self.hosts, key=lambda host: len(host.spool.open_calls()))
            struck.kill()
            self.at_risk = len(struck.spool.open_calls())
            self._wait_for(0.5, batch)
            batch.kill()
            batch.wait()
        self.watch()

    def check(self) -> None:
        """Prove that every image is there and every row in the manifest, once.

        Raises:
            RunFailed: it is not so.
        """
        report = json.loads((self._folder / "report.json").read_text(encoding="utf-8"))
        rows = [item["row"] for item in report["items"]]
        there = self.stage.count_images(self._name)
        if rows != list(range(1, self.images + 1)) or there != self.images:
            raise RunFailed(f"{there} of {self.images} images, {len(set(rows))} rows in {len(rows)} records.")

    def _wait_for(self, part: float, batch: subprocess.Popen[bytes]) -> None:
        while self.stage.sandbox.control.summary().billed_calls < part * self.images:
            if batch.poll() is not None:
                raise RunFailed((self._folder / "said").read_text(errors="replace")[-4000:])
            time.sleep(0.2)


def _measure(stage: Stage, database: Postgres | None, workers: int, images: int, work: Callable[[_Team], None]) -> _Run:
    stage.sandbox.control.reset()
    stage.sandbox.control.settings(latency=_LATENCY, fast=True, fast_bytes=300_000)
    folder = stage.folder / uuid4().hex
    with ExitStack() as stack:
        hosts = []
        for number in range(workers):
            home = folder / f"worker-{number + 1}"
            home.mkdir(parents=True)
            # What one worker has paid for another finds, as many-workers.md has it for workers on several machines.
            shared = {"PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": f"image-bucket/{_RESULTS}"}
            hosts.append(Host(home, {**stage.environment, **shared}))
            stack.callback(hosts[-1].kill)
            hosts[-1].start()
        team = _Team(stage, hosts, folder, images)
        before = _cpu(stage, database, hosts)
        started = time.monotonic()
        work(team)
        seconds = time.monotonic() - started
        after = _cpu(stage, database, hosts)
        team.check()
    paid: Counter[Any] = Counter()
    times = []
    for call in stage.sandbox.control.ledger().rows:
        if call.billed:
            paid[call.prompt] += 1
            times.append(call.time)
    return _Run(
        workers,
        seconds,
        pace=len(times) / max(1.0, (max(times) - min(times)).total_seconds() + _LATENCY),
        cpu={name: after[name] - before[name] for name in after},
        paid_again=paid.total() - len(paid),
        at_risk=team.at_risk,
    )


def _cpu(stage: Stage, database: Postgres | None, hosts: list[Host]) -> dict[str, float]:
    """CPU seconds so far. What was killed is not in it."""
    sandbox = [stage.sandbox.pid, *descendants(stage.sandbox.pid)]
    used = {
        "workers": sum(host.cpu_seconds() for host in hosts),
        "server": cpu_seconds(stage.prefect.pid),
        "sandbox and S3": sum(cpu_seconds(pid) for pid in sandbox),
    }
    if database is not None:
        living = sum(cpu_seconds(pid) for pid in descendants(database.pid))
        used["Postgres"] = living + family_cpu_seconds(database.pid)
    return used


def _print(console: Console, runs: list[_Run], images: int, database: str) -> None:
    table = Table(
        f"{images} images of {_LATENCY:g} s, {IN_FLIGHT_A_WORKER} at once a worker; {database}",
        *("seconds", "images/s", "of one worker", "paid again", "in flight when killed"),
    )
    cpu = Table("CPU seconds by process group", *runs[0].cpu, "cores busy")
    for number, one in enumerate(runs):
        name = f"{one.workers} worker{'s' * (one.workers > 1)}" + (", kills" if number == len(runs) - 1 else "")
        ratio = one.pace / runs[0].pace
        table.add(name, f"{one.seconds:.0f}", f"{one.pace:.1f}", f"{ratio:.2f}", str(one.paid_again), str(one.at_risk))
        cores = sum(one.cpu.values()) / one.seconds
        cpu.add(name, *(f"{value:.0f}" for value in one.cpu.values()), f"{cores:.2f}")
    table.print(console)
    cpu.print(console)
