"""The flows as deployments: started with the plain JSON that the UI's form sends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.exceptions import PrefectHTTPStatusError
from support.deployed_runs import run_deployment

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.sandbox.launching import RunningSandbox

ROOT = Path(__file__).parents[2]
SERVE = """
from prefect import serve
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.flows.publish_image import publish_image
serve(publish_image.to_deployment("form"), publish_batch.to_deployment("form"))
"""


@pytest.fixture
def served(prefect_server: str, sandbox: RunningSandbox, tmp_path: Path) -> Iterator[None]:
    """A process that serves both flows, with the sandbox's account in its environment."""
    environment = {
        **os.environ,
        **sandbox.environment,
        "PREFECT_API_URL": prefect_server,
        "FLUX_PREFECT_SPOOL": str(tmp_path / "spool"),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        yield
        process.terminate()


@pytest.mark.usefixtures("served")
async def test_a_run_from_the_form_publishes(bucket: ImageBucket, sandbox: RunningSandbox) -> None:
    """Models come as objects, the bucket as an address, the account from the worker's environment."""
    request = {"prompt": f"a form {uuid4().hex}", "seed": 3, "aspect_ratio": "1:1", "output_format": "png"}
    one = await run_deployment("publish-image/form", {"request": request, "bucket": bucket.uri})
    rows = [{"id": "a", "prompt": request["prompt"], "seed": 4}, {"id": "b", "prompt": ""}]
    many = await run_deployment("publish-batch/form", {"source": rows, "bucket": bucket.uri, "max_failed": 1})

    assert one.is_completed(), one.message
    assert many.is_completed(), many.message
    assert many.message == "1 published, 1 invalid; 1 call billed, 168,000 credits ($0.08)"
    assert sandbox.control.summary().billed_calls == 2


@pytest.mark.usefixtures("served")
async def test_a_bad_value_is_refused_before_a_run_exists(bucket: ImageBucket) -> None:
    """The server checks what the form sends against the flow's own bounds."""
    with pytest.raises(PrefectHTTPStatusError, match=r"aspect_ratio|not one of"):
        await run_deployment(
            "publish-image/form", {"request": {"prompt": "x", "aspect_ratio": "5:4"}, "bucket": bucket.uri}
        )
