"""The keys are nowhere that they were not put: see also `no_key_left_behind`, over what the whole session left."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.sorting import FlowRunSort
from prefect.logging.handlers import APILogHandler
from support.leaks import KEYS, OTHER_API_KEY, database_files, find_leaks

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BatchFailed
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.sandbox.launching import RunningSandbox

pytestmark = pytest.mark.usefixtures("prefect_server")


async def test_no_key_in_any_log_or_object(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run with every kind of failure at the most talkative log level, then a search through all of its output.

    Searched: the logs on the server and of this process, the server's records and database, and every object of the
    run with its metadata.
    """
    caplog.set_level(logging.DEBUG)
    for fault in ("server_error", "reset_after_work", "html_200", "moderation", "flagged", "unauthorized"):
        sandbox.control.inject(fault, times=1)
    with pytest.raises(BatchFailed) as caught:
        await publish_batch(
            [{"prompt": f"a key among {number} images", "seed": number} for number in range(1, 9)],
            bucket,
            credentials,
            max_in_flight=2,
        )

    await APILogHandler.aflush()
    async with get_client() as client:
        (run,) = await client.read_flow_runs(limit=1, sort=FlowRunSort.START_TIME_DESC)
        of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
        logs = [log.message for log in await client.read_logs(of_run, limit=200)]
    output = "\n".join(
        [caplog.text, repr(caught.value), caught.value.report.model_dump_json(), run.model_dump_json(), *logs]
    )
    assert any("AuthenticationFailed" in line for line in logs)
    assert any("AnswerLost" in line for line in logs)
    assert find_leaks(database_files()) == []
    objects = {key: _read(bucket, key) for key in await bucket.list_keys(most=1000) or ()}
    assert len(objects) >= 6  # an image and its record, two manifests in two forms each
    assert set(KEYS) >= {sandbox.environment["AIMLAPI_KEY"], sandbox.environment["AWS_SECRET_ACCESS_KEY"]}
    for key in KEYS:
        assert key not in output
        assert [name for name, content in objects.items() if key in name or key.encode() in content] == []


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
