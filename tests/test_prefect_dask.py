"""The tasks on a Dask cluster: in other processes, several threads in each."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect import flow, unmapped
from prefect.client.orchestration import SyncPrefectClient
from support.leaks import KEYS, find_leaks

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tasks import download_image, generate_image, upload_to_s3

# Without types of their own, or with other ones than Prefect's.
distributed: Any = importlib.import_module("distributed")
prefect_dask: Any = importlib.import_module("prefect_dask")

IMAGES = 6


@pytest.fixture
def cluster(sandbox: RunningSandbox, tmp_path: Path) -> Iterator[Any]:  # noqa: ARG001 - its processes inherit the environment
    """Two worker processes of two threads each, with their files in the test's folder."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0", local_directory=tmp_path / "dask"
    ) as cluster:
        yield cluster


def test_the_tasks_run_unchanged_on_dask(
    cluster: Any,
    prefect_server: str,
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """By `submit` and by `map`: paid for once, found in the cache by the next run, with no key in any output."""
    runner = prefect_dask.DaskTaskRunner(address=cluster.scheduler_address)
    caplog.set_level(logging.DEBUG)
    requests = [ImageRequest(prompt=f"a lighthouse on dask {uuid4().hex}", seed=7) for _ in range(IMAGES)]

    @flow(task_runner=runner)
    def publish_on_dask() -> tuple[list[bool], list[str]]:
        generations = [generate_image.submit(request, credentials) for request in requests]
        files = download_image.map(generations, unmapped(credentials))
        published = cast("list[PublishedImage]", upload_to_s3.map(files, unmapped(bucket)).result())
        return [image.created for image in published], [str(future.state.name) for future in generations]

    assert publish_on_dask() == ([True] * IMAGES, ["Completed"] * IMAGES)
    totals = sandbox.control.summary()
    assert (totals.calls, totals.billed_calls) == (IMAGES, IMAGES)

    assert publish_on_dask() == ([False] * IMAGES, ["Cached"] * IMAGES)
    assert sandbox.control.summary().calls == IMAGES

    with SyncPrefectClient(prefect_server) as client:
        output = "\n".join(
            [str(cluster.get_logs()), caplog.text, *(log.message for log in client.read_logs(limit=200))]
        )
    assert "distributed.worker" in output
    assert [key for key in KEYS if key in output] == []
    assert find_leaks([tmp_path]) == []  # Dask's own files are there too
