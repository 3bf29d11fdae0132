"""What is published leaves the spool, and costs nothing when it is asked for again."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.host.spool import Spool
from flux_prefect.inline import run_inline
from flux_prefect.pipeline import Production, StepRunner, produce_image, run_as_task
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tasks import download_image, generate_image, upload_to_s3

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow
async def publish_alone(request: ImageRequest, credentials: AimlApiCredentials, bucket: ImageBucket) -> PublishedImage:
    """The three tasks, without the bucket where it can be left out."""
    generation = await generate_image(request, credentials)
    return await upload_to_s3(await download_image(generation, credentials), bucket)


@flow
async def produce(
    request: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials, density: str
) -> Production:
    """One image, in either density."""
    run: StepRunner = run_as_task if density == "steps" else run_inline
    return await produce_image(request, bucket, credentials, run=run)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_PREFECT_KEEP_PUBLISHED_HOURS", "0")


def _images() -> list[str]:
    return [path.name for path in (Spool().root / "pictures").iterdir()]


@pytest.mark.parametrize("shape", ["images", "b64"])
async def test_the_three_tasks_alone_pay_once(
    shape: str,
    sandbox: RunningSandbox,
    credentials: AimlApiCredentials,
    bucket: ImageBucket,
    request_: ImageRequest,
    tmp_path: Path,
) -> None:
    """Also where Prefect's results are gone, the URL is dead, and no task before the upload has the bucket."""
    sandbox.control.settings(response_shape=shape)
    first = await publish_alone(request_, credentials, bucket)
    assert _images() == []
    sandbox.control.inject("dead_url", times=None)
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "fresh"}):
        second = await publish_alone(request_, credentials, bucket)
    assert (second.uri, second.created) == (first.uri, False)
    assert sandbox.control.summary().billed_calls == 1


@pytest.mark.parametrize("density", ["steps", "chunks"])
@pytest.mark.parametrize("shape", ["images", "b64"])
async def test_another_prefix_gets_the_published_bytes(
    density: str,
    shape: str,
    sandbox: RunningSandbox,
    credentials: AimlApiCredentials,
    bucket: ImageBucket,
    request_: ImageRequest,
) -> None:
    """Such as that of the shop, after the one of the trial: nothing is fetched or paid for again."""
    sandbox.control.settings(response_shape=shape)
    (first,) = (await produce(request_, bucket, credentials, density)).images
    assert _images() == []
    sandbox.control.inject("dead_url", times=None)
    shop = bucket.model_copy(update={"prefix": f"{bucket.prefix}/shop"})
    (second,) = (await produce(request_, shop, credentials, density)).images
    assert second.image is not None, second.error
    assert first.image is not None
    assert second.image.created
    assert second.image.key != first.image.key
    assert second.image.sha256 == first.image.sha256
    assert sandbox.control.summary().billed_calls == 1
    assert _images() == []
    kept = Spool().find_generation(first.image.fingerprint)
    assert kept is not None
    assert not any((image.url or "").startswith("data:") for image in kept.images)
