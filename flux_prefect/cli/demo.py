"""`flux-prefect demo`: the main job on this machine alone, twice.

Starts the sandbox and a Prefect server, publishes a prompt table with the command that a person would type, types it
again, and shows from the sandbox's own books that the second time nothing was generated and nothing was paid.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flux_prefect.cli.exit_status import FAILED
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.budget import describe_credits
from flux_prefect.sandbox.launching import SandboxFailed, start_sandbox
from flux_prefect.sandbox.ledger import Summary

__all__ = ["demo"]

PROMPTS = Path(__file__).with_name("demo_prompts.csv")
BUCKET = "s3://images/demo"

_MARK = ".flux_prefect-demo"
_ACCOUNTS = ("AIML", "AWS_", "FLUX_", "PREFECT_")
_UI_PORT = 4200
_SERVER_SECONDS = 180
_STOP_SECONDS = 15


@dataclass(frozen=True)
class PrefectServer:
    """A Prefect server of the demo's own."""

    url: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One run of the command: its report, and what the sandbox's books say of it."""

    report: BatchReport
    calls: int
    downloads: int
    credits_used: float


class DemoFailed(Exception):
    """The demo did not show what it is there to show; the message says where to look."""


def demo(
    *,
    serve: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    folder: Path = Path(".demo"),
    flow: str | None = None,
) -> int:
    """Publish a dozen images on this machine alone, twice. Needs the extra `sandbox`; no account.

    Args:
        serve: Keep the servers running until Ctrl-C, to look at the runs.
        folder: Where everything is kept. Emptied first.
        flow: A flow of your own to run after that, as file.py:function or module:function. It gets the demo's bucket
            and table as its parameters bucket and source or table, where it has them.

    Returns:
        The exit status: 0 if both runs did what they should.
    """
    folder = folder.absolute()
    console = Console(highlight=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # both, also where a shell's background job ignores the first
        signal.signal(number, signal.default_int_handler)
    try:
        _run(folder, console, serve=serve, flow=flow)
    except KeyboardInterrupt:
        console.print("Stopped.")
    except (DemoFailed, SandboxFailed) as error:
        console.print(f"[bold red]The demo failed.[/] {escape(str(error))}")
        return FAILED
    return 0


def _run(folder: Path, console: Console, *, serve: bool, flow: str | None) -> None:
    _empty(folder)
    table = folder / "prompts.csv"
    shutil.copyfile(PROMPTS, table)
    console.print("Starting the image service's sandbox, an S3 server and a Prefect server ...")
    with start_sandbox(folder / "sandbox") as sandbox, _start_prefect(folder / "prefect") as prefect:
        environment = {**_bare_environment(), **sandbox.environment, **prefect.environment}
        runs = []
        for number, title in enumerate(("First run", "The same again"), start=1):
            console.rule(f"[bold]{title}")
            before = sandbox.control.summary()
            report = _publish(folder, table, number, environment, console)
            runs.append(_settle(report, before, sandbox.control.summary()))
        console.rule("[bold]What happened")
        console.print(_compare(runs))
        _check(runs)
        if flow is not None:
            console.rule("[bold]A flow of your own")
            _run_flow(flow, table, environment, console)
        console.print(f"Gallery   {(folder / 'gallery' / 'index.html').as_uri()}")
        if not serve:
            console.print("Prefect   [bold]flux-prefect demo --serve[/] keeps its pages up to look at the runs")
        else:
            console.print(f"Prefect   {prefect.url}/runs")
            console.print("S3        s3://images/demo, with these in the environment:")
            for name, value in {**sandbox.environment, **prefect.environment}.items():
                console.print(f"            export {name}={value}", soft_wrap=True)
        console.print("Next      the README: a flow of your own, the real service, a real bucket")
        if serve:
            console.print("\nServing until Ctrl-C.")
            signal.pause()


def _empty(folder: Path) -> None:
    """Begin with an empty folder, but never remove one that is not an earlier demo's."""
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise DemoFailed(f"{folder} is not empty and not an earlier demo's: name another with --folder.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


def _bare_environment() -> dict[str, str]:
    """The environment without anybody's own Prefect, AWS or service account."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_ACCOUNTS)}


def _publish(folder: Path, table: Path, number: int, environment: dict[str, str], console: Console) -> BatchReport:
    report = folder / f"report-{number}.json"
    arguments = ["publish", "batch", os.path.relpath(table), "--bucket", BUCKET, "--max-in-flight", "4"]
    console.print(f"$ flux-prefect {' '.join(arguments)}", style="bold", soft_wrap=True)
    command = [sys.executable, "-m", "flux_prefect.cli", *arguments, "--report", str(report)]
    if number == 1:
        command += ["--gallery", str(folder / "gallery")]
    _start(command, environment)
    return BatchReport.model_validate_json(report.read_bytes())


def _run_flow(flow: str, table: Path, environment: dict[str, str], console: Console) -> None:
    console.print(f"$ run {flow}", style="bold", soft_wrap=True)
    _start([sys.executable, "-m", "flux_prefect.cli.run_flow", flow, str(table), BUCKET], environment)


def _start(command: list[str], environment: dict[str, str]) -> None:
    status = subprocess.run(command, env=environment, check=False).returncode  # noqa: S603 - our own command
    if status != 0:
        raise DemoFailed(f"The command above ended with exit status {status}.")


def _settle(report: BatchReport, before: Summary, after: Summary) -> Run:
    return Run(
        report,
        calls=after.calls - before.calls,
        downloads=after.downloads - before.downloads,
        credits_used=after.credits - before.credits,
    )


def _compare(runs: list[Run]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for title in ("first run", "the same again"):
        table.add_column(title, justify="right")
    rows: dict[str, list[str]] = {
        "images published": [str(run.report.count("published")) for run in runs],
        "already in the bucket": [str(run.report.count("unchanged")) for run in runs],
        "calls that the service got": [str(run.calls) for run in runs],
        "images downloaded": [str(run.downloads) for run in runs],
        "paid": [describe_credits(run.credits_used) for run in runs],
        "seconds": [f"{run.report.seconds:.1f}" for run in runs],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _check(runs: list[Run]) -> None:
    first, second = runs
    items = first.report.rows
    if (first.report.count("published"), first.calls) != (items, items):
        raise DemoFailed(f"The first run should have published {items} images with {items} calls.")
    if (second.report.count("unchanged"), second.calls, second.downloads) != (items, 0, 0):
        raise DemoFailed("The second run should have found every image and done nothing.")


@contextmanager
def _start_prefect(home: Path) -> Iterator[PrefectServer]:
    home.mkdir(parents=True)
    port = _choose_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
    }
    log = home / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(  # noqa: S603 - Prefect's own command
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env={
                **_bare_environment(),
                **environment,
                "PREFECT_SERVER_UI_API_URL": f"{url}/api",
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which stops it in its turn
        )
    try:
        _wait_for_server(server, url, log)
        yield PrefectServer(url, environment)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for_server(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + _SERVER_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"{url}/api/health", timeout=1).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise DemoFailed(f"The Prefect server did not come up within {_SERVER_SECONDS} s: see {log}.")


def _choose_port() -> int:
    """Prefect's own port where it is free, else any."""
    for port in (_UI_PORT, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as listener:
                return int(listener.getsockname()[1])
        except OSError:
            continue
    raise DemoFailed("There is no free port on 127.0.0.1.")
