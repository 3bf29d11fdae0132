"""A Postgres server of one's own, from Debian's package, for as long as a block runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .prefect_server import ServerFailed, free_port

_NOBODY = "nobody"


@dataclass(frozen=True)
class Postgres:
    """A server that answers.

    Attributes:
        url: what PREFECT_API_DATABASE_CONNECTION_URL must be.
        pid: the process that all others of it come from.
    """

    url: str
    pid: int


@contextmanager
def start_postgres() -> Iterator[Postgres]:
    """An empty database on loopback, some seconds later; its files are gone at the end.

    Postgres refuses to run as root: there it runs as `nobody`.

    Raises:
        ServerFailed: it is not installed (`apt-get install postgresql`), or did not come up.
    """
    with tempfile.TemporaryDirectory(prefix="flux_prefect-postgres-") as name:
        folder, port = Path(name), free_port()
        user: dict[str, Any] = {}
        if os.getuid() == 0:
            shutil.chown(folder, _NOBODY)
            user = {"user": _NOBODY, "group": "nogroup"}
        data = folder / "data"
        _run([_find("initdb"), "-D", str(data), "-U", "flux", "-A", "trust", "-E", "UTF8"], folder, user)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control = [_find("pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]
        _run([*control, "-o", options, "start"], folder, user)
        try:
            pid = int((data / "postmaster.pid").read_text(encoding="ascii").splitlines()[0])
            yield Postgres(f"postgresql+asyncpg://flux@127.0.0.1:{port}/postgres", pid)
        finally:
            _run([*control, "-m", "immediate", "stop"], folder, user)


def _run(command: list[str], folder: Path, user: dict[str, Any]) -> None:
    # To a file: whoever is started with a pipe for its output keeps it open for as long as it runs.
    with (folder / "said").open("wb") as said:
        done = subprocess.run(command, cwd=folder, stdout=said, stderr=said, check=False, **user)
    if done.returncode:
        told = "".join(path.read_text(errors="replace") for path in (folder / "said", folder / "log") if path.exists())
        raise ServerFailed(f"{Path(command[0]).name} failed: {told[-2000:]}")


def _find(program: str) -> str:
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    found = shutil.which(program, path=os.pathsep.join(places))
    if found is None:
        raise ServerFailed(f"{program} is not installed: apt-get install postgresql")
    return found
