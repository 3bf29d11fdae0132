"""Processes killed with `kill -9` at each step, and processes that want the same image at once."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from support.nursery import Batch, Nursery
from support.s3_proxy import Answer, Passing, open_proxy
from support.waiting import wait_for

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.sandbox.launching import RunningSandbox

SECONDS = 60


class Host:
    """A simulated machine for batches: a Prefect home and a spool of its own."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self.nursery = nursery
        self.spool = folder / "spool"
        self._folder = folder

    def publish(self, request: ImageRequest, bucket: ImageBucket, **environment: str) -> Batch:
        """Start `flux-prefect publish batch` over one row."""
        folder = self._folder / uuid4().hex
        folder.mkdir(parents=True)
        table = folder / "prompts.jsonl"
        table.write_text(json.dumps({"id": "one", **request.payload()}), encoding="utf-8")
        environment |= {"FLUX_PREFECT_SPOOL": str(self.spool)}
        return self.nursery.start(folder, str(table), "--bucket", bucket.uri, **environment)


@pytest.fixture
def host(nursery: Nursery, sandbox: RunningSandbox, tmp_path: Path) -> Host:  # noqa: ARG001 - a clean one
    """A machine."""
    return Host(nursery, tmp_path / "here")


@pytest.fixture(scope="module")
def stranger(
    prefect_server: str, running_sandbox: RunningSandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nursery]:
    """What runs flows in another folder, with an empty Prefect home."""
    folder = tmp_path_factory.mktemp("stranger")
    home = {"PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(folder / "home")}
    with Nursery({**os.environ, **running_sandbox.environment, **home}, folder) as nursery:
        yield nursery


@pytest.fixture
def other_host(stranger: Nursery, tmp_path: Path) -> Host:
    """Another machine, but for the locks: two processes that have nothing else in common."""
    return Host(stranger, tmp_path / "elsewhere")


def only_item(batch: Batch) -> dict[str, Any]:
    """The record of its one item, at its end, which must be good."""
    (item,) = batch.report()["items"]
    assert isinstance(item, dict)
    return item


def list_images(bucket: ImageBucket) -> list[dict[str, object]]:
    """What is in the bucket beside the runs' manifests, with the time of its writing."""
    listed = bucket.get_client().list_objects_v2(Bucket="images", Prefix=bucket.prefix)["Contents"]
    return [dict(entry) for entry in listed if "/manifests/" not in entry["Key"]]


def test_killed_after_the_answer_nothing_is_paid_for_again(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    host: Host,
) -> None:
    """Killed while it downloads; the next run goes on from the cached answer."""
    sandbox.control.inject("stall_download", times=1, seconds=30)
    batch = host.publish(request_, bucket)
    wait_for(lambda: sandbox.control.summary().downloads == 1)
    batch.kill()
    item = only_item(host.publish(request_, bucket))

    assert item["status"] == "published"
    assert item["calls"] == 0
    assert sandbox.control.summary().billed_calls == 1
    assert list(host.spool.rglob("*.part")) == []


def test_killed_during_the_call_the_report_names_it(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    host: Host,
) -> None:
    """Only the call that was out may be paid for twice, and its request id is in the next report."""
    sandbox.control.settings(latency=3.0)
    batch = host.publish(request_, bucket)
    wait_for(lambda: bool(list((host.spool / "calls").glob("*.json"))))
    time.sleep(0.3)
    batch.kill()
    sandbox.control.settings(latency=0.0)
    item = only_item(host.publish(request_, bucket))

    assert item["status"] == "published"
    assert item["calls"] == 1
    possibly_billed = item["possibly_billed"]
    assert isinstance(possibly_billed, list)
    assert len(possibly_billed) == 1
    time.sleep(3.0)  # the sandbox carries out the call whose caller died
    assert set(possibly_billed) < {row.client_request_id for row in sandbox.control.ledger().rows}


# The first three PUTs go before the paid call: two prove that the prefix can be written, one is the manifest's. The
# ledger's don't count.
@pytest.mark.parametrize("before_put", [4, 5], ids=["before-the-record", "between-record-and-image"])
def test_killed_during_the_upload_nothing_is_paid_for_again(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    host: Host,
    before_put: int,
) -> None:
    """No half-published image is taken for a whole one; the next run publishes from the spool."""
    stall = Stall(before_put)
    with open_proxy(sandbox.environment["AWS_ENDPOINT_URL_S3"]) as proxy:
        proxy.meddle = stall
        batch = host.publish(request_, bucket, AWS_ENDPOINT_URL_S3=proxy.url)
        assert stall.begun.wait(SECONDS)
        batch.kill()
    before = sandbox.control.summary()
    item = only_item(host.publish(request_, bucket))

    assert item["status"] == "published"
    after = sandbox.control.summary()
    assert (after.calls, after.billed_calls) == (before.calls, before.billed_calls)
    assert before.billed_calls == 1
    keys = [str(entry["Key"]) for entry in list_images(bucket)]
    assert sorted(key.endswith(".json") for key in keys) == [False, True]


def test_an_empty_machine_finds_everything_in_the_bucket(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    host: Host,
    other_host: Host,
) -> None:
    """Another folder, an empty Prefect home and an empty spool: no call, no download, nothing written."""
    host.publish(request_, bucket).finish()
    before = sandbox.control.summary()
    listed = list_images(bucket)
    item = only_item(other_host.publish(request_, bucket))

    assert item["status"] == "unchanged"
    assert sandbox.control.summary() == before
    assert list_images(bucket) == listed


def test_two_processes_at_once_pay_once(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    host: Host,
    other_host: Host,
) -> None:
    """One publishes, the other finds it, and neither fails; not even with Prefect homes of their own."""
    sandbox.control.settings(latency=2.0)
    batches = [each.publish(request_, bucket) for each in (host, other_host)]
    items = [only_item(batch) for batch in batches]

    assert sorted(item["status"] for item in items) == ["published", "unchanged"]
    assert sandbox.control.summary().billed_calls == 1


def test_the_second_process_goes_on_at_once_when_the_first_is_killed(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    request_: ImageRequest,
    host: Host,
) -> None:
    """The dead holder's lock is free, and what it had paid for is used."""
    sandbox.control.inject("stall_download", times=1, seconds=60)
    first = host.publish(request_, bucket)
    wait_for(lambda: sandbox.control.summary().downloads == 1)
    second = host.publish(request_, bucket)
    time.sleep(3)  # the second is up and waits for the first
    assert sandbox.control.summary().calls == 1
    first.kill()
    killed_at = time.monotonic()
    item = only_item(second)

    assert item["status"] == "published"
    assert time.monotonic() - killed_at < 30
    assert sandbox.control.summary().billed_calls == 1


class Stall:
    """An S3 server that answers nothing any more from its nth PUT on, not counting the ledger's."""

    def __init__(self, nth_put: int) -> None:
        self.begun = threading.Event()
        self._puts = itertools.count(1)
        self._nth_put = nth_put

    def __call__(self, request: Passing) -> Answer | None:
        """The answer, as long as there are any."""
        counts = request.method == "PUT" and "/ledger/" not in request.path
        if counts and next(self._puts) >= self._nth_put:
            self.begun.set()
        if not self.begun.is_set():
            return request.forward()
        time.sleep(SECONDS)
        return None
