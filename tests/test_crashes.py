"""Processes killed with `kill -9` at each step, and processes that want the same picture at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from waiting import wait_for

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket import ImageBucket
from flux_prefect.sandbox.launching import RunningSandbox

ROOT = Path(__file__).parents[1]
SECONDS = 60


class Publisher:
    """`python -m flows.publish_batch` over one row, as a process of its own."""

    def __init__(
        self,
        folder: Path,
        request: ImageRequest,
        bucket: ImageBucket,
        environment: dict[str, str],
        folder_to_run_in: Path = ROOT,
    ) -> None:
        table = folder / "prompts.jsonl"
        table.write_text(json.dumps({"id": "one", **request.payload()}), encoding="utf-8")
        self._report = folder / f"report-{time.monotonic_ns()}.json"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "flows.publish_batch", str(table)),
                *("--bucket", bucket.uri, "--report", str(self._report)),
            ],
            cwd=folder_to_run_in,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def finish(self) -> dict[str, object]:
        """Wait for its end, which must be good; the record of its one item."""
        output, _ = self._process.communicate(timeout=SECONDS)
        assert self._process.returncode == 0, output
        (item,) = json.loads(self._report.read_text(encoding="utf-8"))["items"]
        assert isinstance(item, dict)
        return item


@pytest.fixture
def environment(prefect_server: str, sandbox: RunningSandbox, tmp_path: Path) -> dict[str, str]:
    """The environment of a publisher: this test's own spool, the session's Prefect."""
    return {
        **os.environ,
        **sandbox.environment,
        "PREFECT_API_URL": prefect_server,
        "FLUX_PREFECT_SPOOL": str(tmp_path / "spool"),
    }


def list_pictures(bucket: ImageBucket) -> list[dict[str, object]]:
    """What is in the bucket beside the runs' manifests, with the time of its writing."""
    listed = bucket.get_client().list_objects_v2(Bucket="images", Prefix=bucket.prefix)["Contents"]
    return [dict(entry) for entry in listed if "/manifests/" not in entry["Key"]]


def test_killed_after_the_answer_nothing_is_paid_for_again(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Killed while it downloads; the next run goes on from the cached answer."""
    sandbox.control.inject("stall_download", times=1, seconds=30)
    publisher = Publisher(tmp_path, request_, bucket, environment)
    wait_for(lambda: sandbox.control.summary().downloads == 1)
    publisher.kill()
    item = Publisher(tmp_path, request_, bucket, environment).finish()

    assert item["status"] == "published"
    assert item["calls"] == 0
    assert sandbox.control.summary().billed_calls == 1
    assert list((tmp_path / "spool").rglob("*.part")) == []


def test_killed_during_the_call_the_report_names_it(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Only the call that was out may be paid for twice, and its request id is in the next report."""
    sandbox.control.settings(latency=3.0)
    publisher = Publisher(tmp_path, request_, bucket, environment)
    wait_for(lambda: bool(list((tmp_path / "spool" / "calls").glob("*.json"))))
    time.sleep(0.3)
    publisher.kill()
    sandbox.control.settings(latency=0.0)
    item = Publisher(tmp_path, request_, bucket, environment).finish()

    assert item["status"] == "published"
    assert item["calls"] == 1
    possibly_billed = item["possibly_billed"]
    assert isinstance(possibly_billed, list)
    assert len(possibly_billed) == 1
    time.sleep(3.0)  # the sandbox carries out the call whose caller died
    assert set(possibly_billed) < {row.client_request_id for row in sandbox.control.ledger().rows}


# The first PUT is the manifest's, which goes before the paid call.
@pytest.mark.parametrize("before_put", [2, 3], ids=["before-the-record", "between-record-and-picture"])
def test_killed_during_the_upload_nothing_is_paid_for_again(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    environment: dict[str, str],
    tmp_path: Path,
    before_put: int,
) -> None:
    """No half-published picture is taken for a whole one; the next run publishes from the spool."""
    with stalling_proxy(sandbox.environment["AWS_ENDPOINT_URL_S3"], before_put) as (address, stalled):
        publisher = Publisher(tmp_path, request_, bucket, {**environment, "AWS_ENDPOINT_URL_S3": address})
        assert stalled.wait(SECONDS)
        publisher.kill()
    before = sandbox.control.summary()
    item = Publisher(tmp_path, request_, bucket, environment).finish()

    assert item["status"] == "published"
    after = sandbox.control.summary()
    assert (after.calls, after.billed_calls) == (before.calls, before.billed_calls)
    assert before.billed_calls == 1
    keys = [str(entry["Key"]) for entry in list_pictures(bucket)]
    assert sorted(key.endswith(".json") for key in keys) == [False, True]


def test_an_empty_machine_finds_everything_in_the_bucket(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Another folder, an empty Prefect home and an empty spool: no call, no download, nothing written."""
    Publisher(tmp_path, request_, bucket, environment).finish()
    before = sandbox.control.summary()
    listed = list_pictures(bucket)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    empty = {"PREFECT_HOME": str(elsewhere / "home"), "FLUX_PREFECT_SPOOL": str(elsewhere / "spool")}
    item = Publisher(elsewhere, request_, bucket, {**environment, **empty}, folder_to_run_in=elsewhere).finish()

    assert item["status"] == "unchanged"
    assert sandbox.control.summary() == before
    assert list_pictures(bucket) == listed


def test_two_processes_at_once_pay_once(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """One publishes, the other finds it, and neither fails; not even with Prefect homes of their own."""
    sandbox.control.settings(latency=2.0)
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    publishers = [
        Publisher(
            folder,
            request_,
            bucket,
            {**environment, "PREFECT_HOME": str(folder / "home"), "FLUX_PREFECT_SPOOL": str(folder / "spool")},
        )
        for folder in folders
    ]
    items = [publisher.finish() for publisher in publishers]

    assert sorted(str(item["status"]) for item in items) == ["published", "unchanged"]
    assert sandbox.control.summary().billed_calls == 1


def test_the_second_process_goes_on_at_once_when_the_first_is_killed(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """The dead holder's lock is free, and what it had paid for is used."""
    sandbox.control.inject("stall_download", times=1, seconds=60)
    folder = tmp_path / "second"
    folder.mkdir()
    first = Publisher(tmp_path, request_, bucket, environment)
    wait_for(lambda: sandbox.control.summary().downloads == 1)
    second = Publisher(folder, request_, bucket, environment)
    time.sleep(6)  # the second is up and waits for the first
    assert sandbox.control.summary().calls == 1
    first.kill()
    killed_at = time.monotonic()
    item = second.finish()

    assert item["status"] == "published"
    assert time.monotonic() - killed_at < 30
    assert sandbox.control.summary().billed_calls == 1


@contextmanager
def stalling_proxy(target: str, nth_put: int) -> Iterator[tuple[str, threading.Event]]:
    """An S3 address that passes everything on, but from the nth PUT of a connection's life answers nothing."""
    host, port = target.removeprefix("http://").split(":")
    stalled = threading.Event()
    puts = iter(range(1, 1_000_000))
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = [listener]

    def pump(source: socket.socket, sink: socket.socket, *, watch: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if watch and data.startswith(b"PUT ") and next(puts) >= nth_put:
                    stalled.set()
                if stalled.is_set():
                    return
                sink.sendall(data)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, int(port)))
                open_sockets.extend((client, server))
                threading.Thread(target=pump, args=(client, server), kwargs={"watch": True}, daemon=True).start()
                threading.Thread(target=pump, args=(server, client), kwargs={"watch": False}, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", stalled
    finally:
        for each in open_sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
