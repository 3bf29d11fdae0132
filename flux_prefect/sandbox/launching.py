"""A sandbox as a child process, for tests, demos and benchmarks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from flux_prefect.sandbox.control import SandboxControl

__all__ = ["RunningSandbox", "SandboxFailed", "start_sandbox"]

_START_SECONDS = 60
_STOP_SECONDS = 30


class SandboxFailed(Exception):
    """The sandbox did not start; the message holds its output."""


class RunningSandbox:
    """A sandbox that answers. Leaving the `with` block stops it.

    Attributes:
        url: the image service's root.
        environment: what clients of it need: AIMLAPI_BASE_URL, AIMLAPI_KEY and, with S3, the AWS_ names.
        control: its settings, faults and ledger.
        data: its folder.
        pid: the process.
    """

    def __init__(self, process: subprocess.Popen[bytes], environment: Mapping[str, str], data: Path) -> None:
        self._process = process
        self.data = data
        self.environment = dict(environment)
        self.url = self.environment["AIMLAPI_BASE_URL"]
        self.pid = process.pid
        self.control = SandboxControl(self.url)

    def stop(self) -> int:
        """Stop it cleanly, within some seconds, and return its exit status. A second call is harmless."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it with -9."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self, number: signal.Signals) -> int:
        self.control.close()
        return _end(self._process, number)


def start_sandbox(  # noqa: PLR0913 - options, each with its name
    data: Path,
    *,
    port: int = 0,
    s3: bool = True,
    s3_port: int = 0,
    bucket: str = "images",
    api_key: str | None = None,
    s3_access_key: str | None = None,
    s3_secret_key: str | None = None,
    latency: float | None = None,
    fast_bytes: int | None = None,
) -> RunningSandbox:
    """Start a sandbox on `data` and wait until it answers: about 1 second, with S3 about 2.

    It stops by itself when this process ends, however that happens. Its messages go to `sandbox.log` in the
    data folder. `fast_bytes` makes it send prebuilt images of that size.

    Raises:
        SandboxFailed: it did not start.

    Example:
        ```python
        from pathlib import Path

        with start_sandbox(Path("sandbox"), s3=False) as sandbox:
            print(sandbox.environment)
        ```
    """
    data.mkdir(parents=True, exist_ok=True)
    environment_path, log_path = data / "sandbox.env", data / "sandbox.log"
    environment_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "flux_prefect.sandbox", "--quiet", "--until-stdin-closes"]
    options = {
        "--data": data,
        "--env-file": environment_path,
        "--port": port,
        "--s3-port": s3_port,
        "--bucket": bucket,
        "--latency": latency,
        "--fast": fast_bytes,
    }
    command += [text for name, value in options.items() if value is not None for text in (name, str(value))]
    if not s3:
        command.append("--no-s3")
    # Keys go by the environment: the command line can be read by everyone on the machine.
    keys = {
        "FLUX_SANDBOX_API_KEY": api_key,
        "FLUX_SANDBOX_S3_ACCESS_KEY": s3_access_key,
        "FLUX_SANDBOX_S3_SECRET_KEY": s3_secret_key,
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - the command is built above
            command,
            env=os.environ | {name: value for name, value in keys.items() if value is not None},
            # The sandbox stops when the other end of this pipe is gone.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal is for this process, which stops the sandbox in its turn.
            start_new_session=True,
        )
    try:
        _wait_for(environment_path, process, log_path)
        environment = _read(environment_path)
    except BaseException:
        _end(process, signal.SIGKILL)
        raise
    environment_path.unlink()
    return RunningSandbox(process, environment, data)


def _wait_for(environment_path: Path, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not environment_path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SandboxFailed(f"The sandbox did not start. {log_path.read_text(errors='replace').strip()}")
        time.sleep(0.02)


def _read(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    if process.stdin is not None:
        process.stdin.close()
    return process.wait()
