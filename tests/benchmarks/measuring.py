"""One contestant's run, measured: its own process, the Prefect server, and what the service was asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from uuid import uuid4

from typing_extensions import Self

from flux_prefect.sandbox import guard

from .child import BatchContext, Usage
from .contestants import Name
from .contestants.contender import write_table
from .stage import Stage

_ROOT = Path(__file__).parents[2]
_CHILD = f"{__package__}.child"

IN_FLIGHT = 50
"""Default number of paid calls at once, for every contestant."""


class RunFailed(Exception):
    """A contestant did not do the work; the message says what it said."""


@dataclass(frozen=True)
class Measurement:
    """What one run took, without imports, clients and the first image.

    Attributes:
        rows: images asked for.
        seconds: until the contestant was done.
        client_cpu: seconds, of its process, until that ended.
        server_cpu: seconds, of the Prefect server, until that was idle. An idle one uses some 2% of a core.
        peak_memory: of its process, in bytes.
        paid: calls that the service was paid for.
        s3_calls: requests to S3, by operation.
    """

    rows: int
    seconds: float
    client_cpu: float
    server_cpu: float
    peak_memory: int
    paid: int
    s3_calls: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """A table that nobody else asks for, and a home (Prefect's, spool, locks) for the runs of it."""

    name: str
    rows: int
    home: Path


@contextmanager
def new_batch(stage: Stage, rows: int) -> Iterator[Batch]:
    """A batch with its files, which are removed at the end; its images stay in the bucket."""
    with TemporaryDirectory(dir=stage.folder) as name:
        batch = Batch(uuid4().hex, rows, Path(name))
        write_table(batch.home / "table.jsonl", batch.name, rows)
        write_table(batch.home / "warm-up.jsonl", f"{batch.name} warm-up", 1)
        yield batch


def measure(
    stage: Stage, contestant: Name, batch: Batch, *, in_flight: int = IN_FLIGHT, profile: Path | None = None
) -> Measurement:
    """Have a contestant publish a batch, in a fresh process. With a path, its profile is written there.

    Raises:
        RunFailed: it failed, or images are missing afterwards.
    """
    job = BatchContext(
        contestant=contestant,
        in_flight=in_flight,
        prefix=batch.name,
        warm_up=batch.home / "warm-up.jsonl",
        table=batch.home / "table.jsonl",
        profile=profile,
    )
    with _Child(stage, batch.home) as child:
        child.send(job.model_dump_json())
        child.receive()  # it is ready
        server_cpu, paid = stage.prefect.settle(), _paid(stage)
        child.send("go")
        usage = Usage.model_validate_json(child.receive())
    if contestant != "empty" and (missing := batch.rows + 1 - stage.count_images(batch.name)):
        raise RunFailed(f"{contestant} left {missing} of {batch.rows} images out.")
    return Measurement(
        rows=batch.rows,
        seconds=usage.seconds,
        client_cpu=usage.cpu_seconds,
        server_cpu=stage.prefect.settle() - server_cpu,
        peak_memory=usage.peak_memory,
        paid=_paid(stage) - paid,
        s3_calls=usage.s3_calls,
    )


def _paid(stage: Stage) -> int:
    return stage.sandbox.control.summary().billed_calls


class _Child:
    """The measured process and the lines that go to and fro. Leaving the block ends it."""

    def __init__(self, stage: Stage, home: Path) -> None:
        self._log = home / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), sys.executable, "-m", _CHILD],
                env={
                    **stage.environment,
                    "PYTHONPATH": str(_ROOT),
                    "PREFECT_HOME": str(home / "prefect"),
                    "FLUX_PREFECT_SPOOL": str(home / "spool"),
                    "FLUX_PREFECT_LOCKS": str(home / "locks"),
                },
                cwd=home,  # not the repository, where Prefect would read settings
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the child in its turn
            )

    def send(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # `receive` raises the reason
            pipe.write(f"{line}\n")
            pipe.flush()

    def receive(self) -> str:
        pipe = self._process.stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise RunFailed(self._log.read_text(errors="replace")[-4000:])
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
