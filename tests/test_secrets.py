"""The keys are nowhere that they were not put. Runs last, over what the whole session left behind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings

from flows.publish_batch import publish_batch
from flux_prefect.batch.report import BatchFailed
from flux_prefect.bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox

OTHER_API_KEY = "another-key-77aa"  # of test_pipeline

pytestmark = pytest.mark.usefixtures("prefect_server")


async def test_no_key_in_any_log_or_file(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One more run with every kind of failure at the most talkative log level, then a search through everything.

    Searched: Prefect's home with its results and database, the logs on the server and of this process, the spool,
    the locks, the sandbox's books and logs, and every object in the bucket.
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
    database = get_current_settings().server.database.connection_url
    assert database is not None
    database_file = Path(database.get_secret_value().partition("///")[2])
    folders = (home, tmp_path_factory.getbasetemp())  # the second holds the tests' own spools and Prefect homes
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files.extend(database_file.parent.glob(f"{database_file.name}*"))  # its write-ahead log holds the newest
    assert f"{database_file.name}-wal" in {path.name for path in files}
    listed = bucket.get_client().get_paginator("list_objects_v2").paginate(Bucket="images")
    objects = [entry["Key"] for page in listed for entry in page.get("Contents", [])]
    keys = [sandbox.environment["AIMLAPI_KEY"], sandbox.environment["AWS_SECRET_ACCESS_KEY"], OTHER_API_KEY]
    for key in keys:
        assert key not in told
        assert [str(path) for path in files if key.encode() in path.read_bytes()] == []
        assert [name for name in objects if key in name or key.encode() in _read(bucket, name)] == []


def _read(bucket: ImageBucket, key: str) -> bytes:
    stored = bucket.get_client().get_object(Bucket="images", Key=key)
    return stored["Body"].read() + repr(stored["Metadata"]).encode()
