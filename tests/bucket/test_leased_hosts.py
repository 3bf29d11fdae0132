"""Hosts that share nothing but the bucket and Prefect's server: each a warm process with its own home, spool and locks.

What they do to each other: race, die, and fall silent.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from pydantic import SecretStr
from support.nursery import Batch, Nursery
from support.waiting import wait_for

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.sandbox.launching import RunningSandbox

SECONDS = 5
"""How long a holder may be silent: the least that the block takes."""


@dataclass(frozen=True)
class Host:
    """One machine, as far as batches can tell."""

    nursery: Nursery
    folder: Path

    def publish(self, table: Path, bucket: str, *arguments: str, density: str = "chunks") -> Batch:
        """Start a batch over a table into a saved bucket."""
        return self.nursery.start(
            self.folder / uuid4().hex,
            *(str(table), "--bucket", bucket, "--density", density, *arguments),
        )

    def calls(self) -> int:
        """The calls of unknown end in its spool."""
        return len(list((self.folder / "spool" / "calls").glob("*.json")))


def make_bucket(sandbox: RunningSandbox, *, lease_seconds: float | None) -> ImageBucket:
    """A prefix of its own in the sandbox's bucket."""
    return ImageBucket(
        bucket_name="images",
        prefix=uuid4().hex,
        endpoint_url=sandbox.environment["AWS_ENDPOINT_URL_S3"],
        region_name="us-east-1",
        aws_access_key_id=sandbox.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=SecretStr(sandbox.environment["AWS_SECRET_ACCESS_KEY"]),
        lease_seconds=lease_seconds,
    )


@pytest.fixture(scope="module")
def hosts(
    prefect_server: str, running_sandbox: RunningSandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Host, Host]]:
    """Two of them, with the bucket as the place of Prefect's results."""
    results = f"results-{uuid4().hex}"
    make_bucket(running_sandbox, lease_seconds=None).save(results)
    with ExitStack() as stack:
        made = []
        for name in ("first", "second"):
            folder = tmp_path_factory.mktemp(name)
            environment = {
                **os.environ,
                **running_sandbox.environment,
                "PREFECT_API_URL": prefect_server,
                "PREFECT_HOME": str(folder / "home"),
                "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": f"image-bucket/{results}",
                "FLUX_PREFECT_SPOOL": str(folder / "spool"),
                "FLUX_PREFECT_LOCKS": str(folder / "locks"),
            }
            made.append(Host(stack.enter_context(Nursery(environment)), folder))
        first, second = made
        yield first, second


@pytest.fixture
def leased(hosts: tuple[Host, Host], sandbox: RunningSandbox) -> ImageBucket:  # noqa: ARG001 - they need the server
    """A saved bucket with leases."""
    sandbox.control.settings(fast=True, fast_bytes=20_000)
    bucket = make_bucket(sandbox, lease_seconds=SECONDS)
    bucket.save(f"leased-{uuid4().hex}")
    return bucket


def write_table(folder: Path, rows: int) -> Path:
    """Prompts that nobody else has."""
    table, name = folder / "prompts.jsonl", uuid4().hex
    lines = (json.dumps({"prompt": f"{name} {seed}", "seed": seed}) for seed in range(1, rows + 1))
    table.write_text("\n".join(lines), encoding="utf-8")
    return table


def list_objects(bucket: ImageBucket) -> dict[str, str]:
    """The images' keys and ETags, and what is left of leases."""
    listed = bucket.get_client().list_objects_v2(Bucket="images", Prefix=bucket.prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(f"{bucket.prefix}/"): entry["ETag"]
        for entry in listed
        if entry["Key"].endswith(".jpg") or "/leases/" in entry["Key"]
    }


def images(objects: dict[str, str]) -> list[str]:
    """The keys of images."""
    return [key for key in objects if key.endswith(".jpg")]


def test_two_hosts_over_twenty_prompts_pay_twenty_times(
    hosts: tuple[Host, Host], sandbox: RunningSandbox, leased: ImageBucket, tmp_path: Path
) -> None:
    """Each image is made by one of them and found by the other, and no lease stays behind."""
    sandbox.control.settings(latency=2.0)  # long enough for both to come to the same images
    table = write_table(tmp_path, 20)
    batches = [host.publish(table, leased.reference) for host in hosts]
    counts = [batch.finish() for batch in batches]

    assert sum(count.get("published", 0) for count in counts) == 20
    assert sum(count.get("unchanged", 0) for count in counts) == 20
    totals = sandbox.control.summary()
    assert (totals.calls, totals.billed_calls, totals.downloads) == (20, 20, 20)
    objects = list_objects(leased)
    assert len(objects) == len(images(objects)) == 20


def test_a_host_killed_during_a_call_is_relieved(
    hosts: tuple[Host, Host], sandbox: RunningSandbox, leased: ImageBucket, tmp_path: Path
) -> None:
    """The other one waits until the dead one's lease is over, and pays again for the call that was out and no other."""
    sandbox.control.settings(latency=1.0)
    table = write_table(tmp_path, 3)
    first = hosts[0].publish(table, leased.reference, "--max-in-flight", "1")
    wait_for(lambda: len(images(list_objects(leased))) == 1 and sandbox.control.summary().in_flight == 1)
    first.signal(signal.SIGKILL)
    killed_at = time.monotonic()
    assert first.wait() == -signal.SIGKILL
    sandbox.control.settings(latency=0.0)
    counts = hosts[1].publish(table, leased.reference).finish()

    assert time.monotonic() - killed_at > SECONDS
    assert counts == {"published": 2, "unchanged": 1}
    totals = sandbox.control.summary()
    assert (totals.calls, totals.billed_calls) == (4, 4)
    assert hosts[0].calls() == 1
    assert len(list_objects(leased)) == 3


def test_what_a_dead_host_had_paid_for_is_used(
    hosts: tuple[Host, Host], sandbox: RunningSandbox, leased: ImageBucket, tmp_path: Path
) -> None:
    """Killed between the answer and the upload: the answer is in the bucket, and the other one pays nothing."""
    sandbox.control.inject("stall_download", times=1, seconds=60)
    table = write_table(tmp_path, 1)
    first = hosts[0].publish(table, leased.reference)
    wait_for(lambda: sandbox.control.summary().downloads == 1)
    first.kill()
    second = hosts[1].publish(table, leased.reference)

    assert second.finish() == {"published": 1}
    totals = sandbox.control.summary()
    assert (totals.calls, totals.billed_calls) == (1, 1)
    assert len(list_objects(leased)) == 1


def test_a_host_that_was_stopped_past_its_lease_sends_nothing_more(
    hosts: tuple[Host, Host], sandbox: RunningSandbox, leased: ImageBucket, tmp_path: Path
) -> None:
    """SIGSTOP with one call out and another waiting for its turn; when it goes on, all is done by the other one.

    It neither sends that call nor writes over anything: the answer that it had paid for finds its place taken.
    """
    sandbox.control.settings(latency=2.0)
    table = write_table(tmp_path, 3)
    limits = ("--max-in-flight", "1", "--max-failed", "3")
    first = hosts[0].publish(table, leased.reference, *limits, density="steps")
    wait_for(lambda: len(list_objects(leased)) >= 2 and sandbox.control.summary().in_flight == 1)
    first.signal(signal.SIGSTOP)
    assert images(list_objects(leased)) == []
    sandbox.control.settings(latency=0.0)
    assert hosts[1].publish(table, leased.reference).finish() == {"published": 3}
    totals, objects = sandbox.control.summary(), list_objects(leased)
    first.signal(signal.SIGCONT)
    counts = first.finish()

    assert totals.calls == 4
    assert sandbox.control.summary().calls == totals.calls
    assert list_objects(leased) == objects
    assert counts.get("published", 0) == 0
    assert counts["failed"] >= 1
    assert sum(counts.values()) == 3
