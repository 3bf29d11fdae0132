"""The keys are nowhere that they were not put: see also `no_key_left_behind`, over what the whole session left."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from leaks import KEYS, OTHER_API_KEY, database_files, find_leaks
from prefect.client.orchestration import get_client

from flows.publish_batch import publish_batch
from flux_prefect.batch.report import BatchFailed
from flux_prefect.bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox

pytestmark = pytest.mark.usefixtures("prefect_server")


async def test_no_key_in_any_log_or_object(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run with every kind of failure at the most talkative log level, then a search through all that it told.

    Searched: the logs on the server and of this process, the server's records and database, and every object in the
    bucket with its metadata.
    """
    caplog.set_level(logging.DEBUG)
    for fault in ("unauthorized", "server_error", "reset_after_work", "html_200", "moderation", "flagged"):
        sandbox.control.inject(fault, times=1)
    with pytest.raises(BatchFailed) as caught:
        await publish_batch(
            [{"prompt": f"a key among {number} pictures", "seed": number} for number in range(1, 9)],
            bucket,
            credentials,
            max_in_flight=2,
        )

    async with get_client() as client:
        logs = "\n".join(log.message for log in await client.read_logs(limit=200))
        runs = "\n".join(run.model_dump_json() for run in await client.read_flow_runs(limit=200))
    told = "\n".join([caplog.text, repr(caught.value), caught.value.report.model_dump_json(), logs, runs])
    assert len(logs) > 100
    assert find_leaks(database_files()) == []
    listed = bucket.get_client().get_paginator("list_objects_v2").paginate(Bucket="images")
    objects = [entry["Key"] for page in listed for entry in page.get("Contents", [])]
    assert set(KEYS) >= {sandbox.environment["AIMLAPI_KEY"], sandbox.environment["AWS_SECRET_ACCESS_KEY"]}
    for key in KEYS:
        assert key not in told
        assert [name for name in objects if key in name or key.encode() in _read(bucket, name)] == []


def test_the_search_finds_a_key(tmp_path: Path) -> None:
    """In whatever file, however deep."""
    hidden = tmp_path / "deep" / "down.bin"
    hidden.parent.mkdir()
    hidden.write_bytes(b"\0\1" + OTHER_API_KEY.encode() + b"\2")
    assert find_leaks([tmp_path]) == [str(hidden)]
    hidden.unlink()


def _read(bucket: ImageBucket, key: str) -> bytes:
    stored = bucket.get_client().get_object(Bucket="images", Key=key)
    return stored["Body"].read() + repr(stored["Metadata"]).encode()
