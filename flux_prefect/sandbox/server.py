"""Run the service and the S3 server together, from start to shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock, Timeout

from flux_prefect.api.models import GENERATIONS_PATH
from flux_prefect.sandbox.ledger import Ledger
from flux_prefect.sandbox.s3 import REGION, S3Failed, S3Options, S3Server
from flux_prefect.sandbox.service import create_app
from flux_prefect.sandbox.state import State
from flux_prefect.sandbox.wire import TransportProtocol

__all__ = ["CannotStart", "SandboxOptions", "run"]

_GRACE_SECONDS = 1
"""How long answers in progress may still take once the sandbox stops, in seconds."""


class CannotStart(Exception):
    """The sandbox can't start; the message says what to do."""


@dataclass(frozen=True)
class SandboxOptions:
    """The options of the command line."""

    data: Path
    host: str
    port: int
    api_key: str
    s3_port: int | None
    bucket: str
    s3_access_key: str
    s3_secret_key: str
    env_file: Path | None = None
    quiet: bool = False
    access_log: bool = False
    until_stdin_closes: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def run(options: SandboxOptions) -> int:
    """Run until SIGINT or SIGTERM. Returns the exit status: 0, or 1 if the S3 server died.

    Raises:
        CannotStart: a port is taken, another sandbox uses the folder, or the S3 server doesn't start.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            options.data.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_hold(options.data))
            listener = stack.enter_context(_listen(options.host, options.port))
            s3 = _start_s3(options, stack)
            ledger = Ledger(options.data / "ledger.sqlite3")
            stack.callback(ledger.close)
            state = State(ledger, options.api_key, options.settings)
            environment = _environment(options, listener, s3)
            return asyncio.run(_serve(options, state, listener, s3, environment))
    except KeyboardInterrupt:
        return 0


class _Server(uvicorn.Server):
    """uvicorn, but the signals are ours: it would raise them again when it is done."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def stop(self) -> None:
        """Finish the answers in progress within the grace period, then stop."""
        self.should_exit = True
        # What the stop cuts short would be logged as a failure, with a traceback.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


async def _serve(
    options: SandboxOptions,
    state: State,
    listener: socket.socket,
    s3: S3Server | None,
    environment: dict[str, str],
) -> int:
    server = _Server(
        uvicorn.Config(
            create_app(state),
            http=TransportProtocol,
            ws="none",
            lifespan="off",
            log_level="info" if options.access_log else "warning",
            access_log=options.access_log,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        ),
        lambda: _announce(options, environment),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    if options.until_stdin_closes:
        loop.add_reader(sys.stdin.fileno(), _stop_at_end_of_input, server)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    status = 0
    while not serving.done():
        await asyncio.wait([serving], timeout=1)
        if s3 is not None and not s3.running and not server.should_exit:
            sys.stderr.write("The S3 server has died; see s3.log in the data folder.\n")
            status = 1
            server.stop()
    await serving
    return status


def _stop_at_end_of_input(server: _Server) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        server.stop()


@contextmanager
def _hold(data: Path) -> Generator[None, None, None]:
    lock = FileLock(data / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CannotStart(
            f"Another sandbox is running on {data}: stop it, or choose another folder with --data."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _listen(host: str, port: int) -> Generator[socket.socket, None, None]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotStart(
            f"Can't listen on {host}:{port} ({error.strerror}): choose another with --port, or 0 for any free one."
        ) from error
    with listener:
        yield listener


def _start_s3(options: SandboxOptions, stack: ExitStack) -> S3Server | None:
    if options.s3_port is None:
        return None
    server = S3Server(
        S3Options(
            folder=(options.data / "s3").resolve(),
            bucket=options.bucket,
            access_key=options.s3_access_key,
            secret_key=options.s3_secret_key,
            port=options.s3_port,
        )
    )
    stack.callback(server.stop)
    try:
        server.start()
    except S3Failed as error:
        raise CannotStart(str(error)) from error
    return server


def _environment(options: SandboxOptions, listener: socket.socket, s3: S3Server | None) -> dict[str, str]:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)  # noqa: S104 - read, not bound
    port = listener.getsockname()[1]
    environment = {
        "AIMLAPI_BASE_URL": f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
        "AIMLAPI_KEY": options.api_key,
    }
    if s3 is not None:
        environment |= {
            "AWS_ENDPOINT_URL_S3": s3.url,
            "AWS_ACCESS_KEY_ID": options.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": options.s3_secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }
    return environment


def _announce(options: SandboxOptions, environment: dict[str, str]) -> None:
    if options.env_file is not None:
        _write_whole(options.env_file, "".join(f"{name}={value}\n" for name, value in environment.items()))
    if options.quiet:
        return
    exports = "\n".join(f"  export {name}={shlex.quote(value)}" for name, value in environment.items())
    bucket = f"\nImages go to s3://{options.bucket}." if options.s3_port is not None else ""
    sys.stdout.write(
        f"The sandbox answers at {environment['AIMLAPI_BASE_URL']}; its data is in {options.data}.{bucket}\n\n"
        f"{exports}\n\n"
        "Try it:\n\n"
        f'  curl -s $AIMLAPI_BASE_URL{GENERATIONS_PATH} -H "Authorization: Bearer $AIMLAPI_KEY" \\\n'
        "    -H 'Content-Type: application/json' \\\n"
        '    -d \'{"model": "flux/kontext-max/text-to-image", "prompt": "A boat on the sea", "seed": 7}\'\n\n'
        "Ctrl-C stops it.\n"
    )
    sys.stdout.flush()


def _write_whole(path: Path, text: str) -> None:
    """Readers find the whole file or none. Only its owner may read it: it holds keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)
