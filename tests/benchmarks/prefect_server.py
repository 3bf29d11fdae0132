"""A Prefect server in a process of its own, whose CPU time can be read."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import httpx

from flux_prefect.sandbox import guard

from .processes import cpu_seconds

_START_SECONDS = 120
_IDLE_SECONDS = 3.0
_IDLE_SHARE = 0.04  # of one core: what its services use for looking whether there is anything to do
_LONGEST_WORK = 600
NO_UI: Mapping[str, str] = {"PREFECT_SERVER_UI_ENABLED": "false"}
"""The settings of a server that nobody looks at."""


class ServerFailed(Exception):
    """The Prefect server did not come up, or never came to rest; the message says where to look."""


class PrefectServer:
    """A server that answers.

    Attributes:
        api_url: what PREFECT_API_URL must be.
        pid: the process.
    """

    def __init__(self, pid: int, api_url: str) -> None:
        self.api_url = api_url
        self.pid = pid

    def settle(self) -> float:
        """Wait until its CPU time is flat for 3 seconds; its CPU time, in seconds, when that began.

        A server goes on working for up to half a minute after a flow has ended.

        Raises:
            ServerFailed: it did not come to rest.
        """
        end = time.monotonic() + _LONGEST_WORK
        while time.monotonic() < end:
            before = cpu_seconds(self.pid)
            time.sleep(_IDLE_SECONDS)
            if cpu_seconds(self.pid) - before <= _IDLE_SHARE * _IDLE_SECONDS:
                return before
        raise ServerFailed(f"The Prefect server was still at work after {_LONGEST_WORK} s.")


@contextmanager
def start_prefect(
    home: Path, settings: Mapping[str, str] = NO_UI, template: Path | None = None
) -> Iterator[PrefectServer]:
    """A server with a database of its own, some ten seconds later. It dies with this process, however that dies.

    Args:
        home: its folder, which must not exist yet.
        settings: PREFECT_ variables of its own. The default leaves the UI away.
        template: the database of another server that was new: where it exists, this one begins with a copy, which
            saves four seconds of CPU time.

    Raises:
        ServerFailed: it did not come up.
    """
    home.mkdir(parents=True)
    database = home / "prefect.db"
    if template is not None and template.exists():
        shutil.copy(template, database)
    url = f"http://127.0.0.1:{free_port()}"
    log = home / "server.log"
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), sys.executable, *command],
            env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_UI_API_URL": f"{url}/api", **settings},
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the server in its turn
        )
    try:
        _wait_for(server, url, log)
        yield PrefectServer(server.pid, f"{url}/api")
    finally:
        server.kill()  # its database goes with it: nothing is worth the quarter of a minute of an orderly end
        server.wait()


def _wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"{url}/api/health", timeout=1).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise ServerFailed(f"The Prefect server did not come up within {_START_SECONDS} s: {log.read_text()[-2000:]}")


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def copy_database(database: Path, template: Path) -> None:
    """Copy an SQLite database, which may be in use: whole or not at all."""
    part = template.with_name(f"{template.name}.{os.getpid()}")
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(part)) as target:
        source.backup(target)
    part.replace(template)
