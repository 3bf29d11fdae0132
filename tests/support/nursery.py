"""Flows as processes of their own, forked from one warm process: each begins at once instead of after four seconds.

Each is the `main` of a flow's module up to the interpreter's own end. The warm process takes an order a line on its
standard input, and answers each with a line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from flux_prefect.cli.app import app

ROOT = Path(__file__).parents[2]
COMMAND = "flux_prefect.cli.app"


class Batch:
    """A running batch from a command line, with a folder of its own for its output and its report."""

    def __init__(self, nursery: Nursery, pid: int, folder: Path) -> None:
        self.pid = pid
        self._nursery = nursery
        self._folder = folder

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; the exit status, or minus the signal that ended it."""
        return self._nursery.wait(self.pid)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def report(self) -> dict[str, Any]:
        """Wait for its end, which must be good; its report."""
        assert self.wait() == 0, self.said
        report = json.loads((self._folder / "report.json").read_text(encoding="utf-8"))
        assert isinstance(report, dict)
        return report

    def finish(self) -> dict[str, int]:
        """Wait for its end, which must be good; how many rows ended in each way."""
        counts = self.report()["counts"]
        assert isinstance(counts, dict)
        return counts

    @property
    def said(self) -> str:
        """What it has written to the terminal."""
        return (self._folder / "said.txt").read_text(encoding="utf-8", errors="replace")


class Nursery:
    """The warm process, in a folder. Leaving the `with` block ends it, and whatever it has started."""

    def __init__(self, environment: Mapping[str, str], folder: Path = ROOT) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running: set[int] = set()

    def start(self, folder: Path, *arguments: str, command: str = "batch", **environment: str) -> Batch:
        """Start a batch with these arguments and changes to the environment."""
        folder.mkdir(parents=True, exist_ok=True)
        said = folder / "said.txt"
        arguments = ("publish", command, *arguments, "--report", str(folder / "report.json"))
        return Batch(self, self.fork(COMMAND, arguments, environment, said), folder)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What `flux-prefect` comes to with these arguments, and with the spool of the test that asks."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            spool = {"FLUX_PREFECT_SPOOL": os.environ["FLUX_PREFECT_SPOOL"]}
            status = self.wait(self._fork(COMMAND, arguments, spool, out, err))
            return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())

    def fork(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], said: Path) -> int:
        """Run a module's `main` in a process of its own, with all of its output in a file; the process's id."""
        return self._fork(module, arguments, environment, said, said)

    def wait(self, pid: int) -> int:
        """Wait for the end of a batch; its exit status, or minus the signal that ended it."""
        status = self._order({"wait": pid})
        self._running.remove(pid)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        self._process.communicate()

    def _fork(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], out: Path, err: Path) -> int:
        pid = self._order(
            {
                "module": module,
                "arguments": arguments,
                "environment": environment,
                "out": str(out),
                "err": str(err),
            }
        )
        self._running.add(pid)
        return pid

    def _order(self, order: dict[str, object]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def serve() -> int:
    """Take orders until the last; in a process that is to run a flow, run it and return its exit status."""
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "wait" in order:
            answer(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]))
            continue
        module = importlib.import_module(order["module"])
        if order["module"] == COMMAND:
            warm_up(order["arguments"])
        child = os.fork()
        if not child:
            os.environ.update(order["environment"])
            out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            err = out if order["err"] == order["out"] else os.open(order["err"], os.O_WRONLY | os.O_CREAT, 0o600)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for ours, theirs in ((nothing, 0), (out, 1), (err, 2)):
                os.dup2(ours, theirs)
            return int(module.main(order["arguments"]))
        answer(child)
    os._exit(0)


def warm_up(arguments: Sequence[str]) -> None:
    """Import what a command is made of, which each of its processes then has."""
    command = app
    for name in arguments:
        if name not in command:
            return
        command = command[name]


def answer(number: int) -> None:
    """Send a line back."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(serve())
