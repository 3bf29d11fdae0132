"""The tasks as people use them in flows of their own."""

from __future__ import annotations

from typing import Any, cast

import pytest
from prefect import flow, unmapped

from flux_prefect.api.models import Generation, ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tasks import download_image, find_published, generate_image, upload_to_s3

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_map_and_submit_work_in_a_sync_flow(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """A foreign flow of three requests: each is paid for once, and the in-flight limit holds over its threads."""
    account = credentials.model_copy(update={"max_in_flight": 2})
    sandbox.control.settings(latency=0.2)

    @flow
    def catalogue(requests: list[ImageRequest]) -> list[PublishedImage]:
        generations = generate_image.map(requests, unmapped(account))
        files = download_image.map(generations, unmapped(account))
        return cast("list[PublishedImage]", upload_to_s3.map(files, unmapped(bucket)).result())

    requests = [request_.model_copy(update={"seed": seed}) for seed in (1, 2, 3, 4)]
    published = catalogue(requests)

    assert [image.seed for image in published] == [1, 2, 3, 4]
    assert sandbox.control.summary().billed_calls == 4
    assert sandbox.control.summary().peak_in_flight == 2


def test_the_same_request_mapped_twice_is_paid_for_once(
    sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Three threads at the same moment: one pays, the others get what it has paid for."""
    sandbox.control.settings(latency=0.3)

    @flow
    def thrice() -> list[Generation]:
        results: Any = generate_image.map([request_] * 3, unmapped(credentials)).result()
        return list(results)

    one, two, three = thrice()
    assert one == two == three
    assert sandbox.control.summary().billed_calls == 1


async def test_a_request_without_a_seed_is_generated_every_time(
    sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """It is not cacheable; the seed that the service drew is recorded."""
    unseeded = request_.model_copy(update={"seed": None})

    @flow
    async def twice() -> list[int | None]:
        return [(await generate_image(unseeded, credentials)).seed for _ in range(2)]

    seeds = await twice()
    assert None not in seeds
    assert len(set(seeds)) == 2
    assert sandbox.control.summary().billed_calls == 2


async def test_refreshing_the_cache_pays_anew(
    sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """`refresh_cache=True` means what it means in Prefect; the spool doesn't stand in its way."""

    @flow
    async def refresh() -> None:
        await generate_image(request_, credentials)
        await generate_image.with_options(refresh_cache=True)(request_, credentials)

    await refresh()
    assert sandbox.control.summary().billed_calls == 2


async def test_find_published_looks_without_paying(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """None before, the image after."""

    @flow
    async def look_publish_look() -> tuple[PublishedImage | None, PublishedImage | None]:
        before = await find_published(request_, bucket, credentials)
        generation = await generate_image(request_, credentials)
        await upload_to_s3(await download_image(generation, credentials), bucket)
        return before, await find_published(request_, bucket, credentials)

    before, after = await look_publish_look()
    assert before is None
    assert after is not None
    assert after.seed == 7
    assert sandbox.control.summary().calls == 1
