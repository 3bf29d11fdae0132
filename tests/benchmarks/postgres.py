"""A Postgres of one's own, from the system's package, as an unprivileged user."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .prefect_server import free_port

_DEBIAN = Path("/usr/lib/postgresql")
_START_SECONDS = 60
_DATABASE = "prefect"
_PASSWORD = "a-password-of-the-tests"


class Postgres:
    """A server that answers, with an empty database.

    Attributes:
        url: of the database, as Prefect's server takes it.
        pid: the process that all others of it come from.
    """

    def __init__(self, binaries: Path, account: str, port: int, pid: int) -> None:
        self.url = f"postgresql+asyncpg://{account}:{_PASSWORD}@127.0.0.1:{port}/{_DATABASE}"
        self.pid = pid
        self._binaries = binaries
        self._environment = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(port),
            "PGUSER": account,
            "PGPASSWORD": _PASSWORD,
            "PGDATABASE": _DATABASE,
        }

    def run(self, program: str, *arguments: str) -> str:
        """What one of Postgres's own programs says, such as psql.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        done = subprocess.run(
            [self._binaries / program, *arguments], env=self._environment, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()


class NoPostgres(Exception):
    """There is no Postgres on this machine; the message says what to do."""


def find_binaries() -> Path:
    """The folder of initdb and postgres: of Debian's newest, which are on no path, else from the path.

    Raises:
        NoPostgres: they are in neither place.
    """
    newest = max(_DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]), default=None)
    found = newest or shutil.which("initdb")
    if found is None:
        raise NoPostgres("No Postgres here: apt-get install postgresql")
    return Path(found).resolve().parent


@contextmanager
def start_postgres() -> Iterator[Postgres]:
    """A server with its files in a folder of its own, some three seconds later; both are gone at the end.

    It dies with this process, however that dies.

    Raises:
        NoPostgres: it is not installed.
        subprocess.CalledProcessError: it could not be set up.
        TimeoutError: it did not answer.
    """
    binaries, account = find_binaries(), _find_account()
    # Not below pytest's own folder, into which nobody else may look.
    folder = Path(tempfile.mkdtemp(prefix="flux_prefect-postgres-"))
    try:
        secret, data, log = folder / "secret", folder / "data", folder / "log"
        secret.write_text(_PASSWORD, encoding="utf-8")
        for path in (folder, secret):
            shutil.chown(path, account)
        options = ["-U", account, "--auth=scram-sha-256", "--locale=C.UTF-8", "-E", "UTF8", "--no-sync"]
        subprocess.run(
            [*_become(account), binaries / "initdb", "-D", data, "--pwfile", secret, *options],
            check=True,
            capture_output=True,
        )
        port = free_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": "",
            "fsync": "off",  # nobody needs it after a power cut
        }
        given = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [*_become(account), binaries / "postgres", "-D", data, *given],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                server = Postgres(binaries, account, port, process.pid)
                _wait_for(server, process, log)
                server.run("createdb", _DATABASE, "--maintenance-db=postgres")
                yield server
            finally:
                process.send_signal(signal.SIGINT)  # at once, though clients are connected
    finally:
        shutil.rmtree(folder)


def _find_account() -> str:
    """Postgres refuses to run as root."""
    if os.getuid() != 0:
        return getpass.getuser()
    return next(name for name in ("postgres", "nobody") if _exists(name))


def _exists(name: str) -> bool:
    return any(entry.pw_name == name for entry in pwd.getpwall())


def _become(account: str) -> list[str]:
    """Return the command prefix that runs a command as that user and interrupts it when this process dies."""
    command = ["setpriv", "--pdeathsig", "INT"]
    if os.getuid() == 0:
        command += ["--reuid", account, "--regid", str(pwd.getpwnam(account).pw_gid), "--clear-groups"]
    return command


def _wait_for(server: Postgres, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            server.run("pg_isready")
        except subprocess.CalledProcessError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"Postgres did not answer: {log.read_text(errors='replace')[-2000:]}")
