"""`python -m tests.benchmarks [name ...]`: run the benchmarks and print their tables."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import get_args

from rich.console import Console

from flux_prefect.sandbox.launching import SandboxFailed

from . import forecast, hotspots, memory, rerun, sharded, throughput
from .contestants import Name
from .measuring import RunFailed
from .postgres import NoPostgres
from .prefect_server import ServerFailed

_NAMES = ("throughput", "memory", "rerun", "forecast")
_LONG = ("sharded",)  # half an hour, for who asks for it


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 0 where everything was measured, whatever came out."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure what the project costs.")
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"{', '.join(_NAMES)} (default: all of them); {', '.join(_LONG)}"
    )
    parser.add_argument("--images", type=int, metavar="N", help="images of the (largest) batch of each benchmark")
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of each contestant")
    parser.add_argument("--postgres", action="store_true", help="of sharded: the server's database is Postgres")
    parser.add_argument("--profile", choices=get_args(Name), help="show where this contestant's time goes, instead")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - {*_NAMES, *_LONG})
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}: choose from {', '.join((*_NAMES, *_LONG))}")
    console = Console(highlight=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # both, also where a shell's background job ignores the first
        signal.signal(number, signal.default_int_handler)
    try:
        _run(given, console)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    except (NoPostgres, RunFailed, SandboxFailed, ServerFailed) as error:
        console.print(f"Not measured. {error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


def _run(given: argparse.Namespace, console: Console) -> None:
    images = {} if given.images is None else {"images": given.images}
    rounds = {} if given.rounds is None else {"rounds": given.rounds}
    if given.profile is not None:
        hotspots.run(console, given.profile, **images)
        return
    chosen = given.names or _NAMES
    if "throughput" in chosen:
        throughput.run(console, **images, **rounds)
    if "memory" in chosen:
        memory.run(console, **images)
    if "rerun" in chosen:
        rerun.run(console, **images, **rounds)
    if "sharded" in chosen:
        sharded.run(console, **images, postgres=given.postgres)
    if "forecast" in chosen:
        forecast.run(console, **rounds)


if __name__ == "__main__":
    sys.exit(main())
