"""The Prefect tasks: find, generate, download, upload.

Each costs one task run. Results are small JSON records; the bytes of images never pass between tasks.
"""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.tasks import Task

from flux_prefect import custody
from flux_prefect.api.models import Generation, ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage, PublishingRun
from flux_prefect.cache_policies import GENERATION, IMAGE
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import Billed, FluxError, ServiceError
from flux_prefect.host.spool import ImageFile, Spool
from flux_prefect.inline import current_step, step_logger
from flux_prefect.settings import settings_at_import

__all__ = ["download_image", "find_published", "generate_image", "is_worth_repeating", "upload_to_s3"]

_SETTINGS = settings_at_import()


def is_worth_repeating(
    task: Task[Any, Any],  # noqa: ARG001 - the error alone decides
    task_run: TaskRun,  # noqa: ARG001 - as above
    state: State[Any],
) -> bool:
    """Whether Prefect should run a failed step again.

    Yes for a temporary failure that was not billed. A request whose answer was lost is sent again as often as
    `FLUX_PREFECT_REPEAT_UNKNOWN` allows, over all retries and runs of the host. An image that was paid for is fetched
    again without being paid for again.
    """
    error = state.data
    if not isinstance(error, FluxError) or not error.retryable:
        return False
    return not isinstance(error, ServiceError) or error.billed is not Billed.YES


@task(
    name="find-published",
    task_run_name="find {request.label}",
    cache_policy=NO_CACHE,
    retries=_SETTINGS.retries,
    retry_delay_seconds=_SETTINGS.retry_delay_seconds,
    retry_condition_fn=is_worth_repeating,
)
async def find_published(
    request: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials, index: int = 0
) -> PublishedImage | None:
    """Find the published image of a request in the bucket, or return None. Costs one HEAD; nothing is paid.

    Raises:
        ValueError: the request has no seed.
        BucketError: the bucket can't say, or holds something else under the image's key.

    Example:
        ```python
        published = await find_published(request, bucket, credentials)
        print("not published yet" if published is None else published.uri)
        ```
    """
    return await bucket.find(request, request.fingerprint(credentials.base_url), index)


@task(
    name="generate-image",
    task_run_name="generate {request.label}",
    cache_policy=GENERATION,
    persist_result=True,
    result_serializer="json",
    cache_result_in_memory=False,
    retries=_SETTINGS.retries,
    retry_delay_seconds=_SETTINGS.retry_delay_seconds,
    retry_condition_fn=is_worth_repeating,
)
async def generate_image(
    request: ImageRequest,
    credentials: AimlApiCredentials,
    replacing: str | None = None,
    bucket: ImageBucket | None = None,
) -> Generation:
    """Generate an image: one paid call, cached on prompt + seed (see `PromptSeedCachePolicy`).

    The same request at the same time is paid for once on a host. A paid answer that is missing
    from Prefect's results is read from the spool instead of being paid for again. Waiting for a rate limit happens
    inside; every other temporary failure is a Prefect retry.

    With `bucket` it is paid for once over all hosts that name it. A published image is found by a HEAD, and its
    generation is read back from its record. A paid answer is kept in the bucket, below `answers/`, until
    `upload_to_s3` has published its images, so that another host fetches the image from its URL while that lives.
    Two hosts at the same moment pay once if the bucket has `lease_seconds`; without it both may pay. Without `bucket`
    no other host knows of the answer, unless they share Prefect's result storage, and each may pay. A request without
    a seed is paid for each time.

    Args:
        request: What to make.
        credentials: The account that pays.
        replacing: The `client_request_id` of an answer whose URL has died. With `refresh_cache=True` the image is paid
            for anew, once.
        bucket: Where the image will be published.

    Raises:
        ServiceError: its `billed` says what it means for money.
        SpoolUnwritable: nothing was sent.
        BucketError: the bucket can't be read or written; nothing was sent.

    Example:
        ```python
        generation = await generate_image(ImageRequest(prompt="a lighthouse", seed=7), credentials, bucket=bucket)
        print(generation.images[0].url, generation.credits_used)
        ```
    """
    logger = step_logger()
    step = current_step()
    order = custody.Order(refresh=step.refresh, replacing=replacing, task_run_id=str(step.id))
    async with credentials.open_client() as client:
        generation, paid = await custody.obtain(request, client, Spool(), order, results=step.results, bucket=bucket)
    if not paid:
        logger.info("Paid for on %s already: nothing sent.", generation.created_at)
    if request.seed is not None and generation.reported_seed not in {None, request.seed}:
        logger.warning(
            "The service reports seed %s for a request with seed %s: the image may not come out the same again.",
            generation.reported_seed,
            request.seed,
        )
    return generation


@task(
    name="download-image",
    task_run_name="download {generation.request.label}",
    cache_policy=IMAGE,
    persist_result=True,
    result_serializer="json",
    cache_result_in_memory=False,
    retries=_SETTINGS.retries,
    retry_delay_seconds=_SETTINGS.retry_delay_seconds,
    retry_condition_fn=is_worth_repeating,
)
async def download_image(
    generation: Generation, credentials: AimlApiCredentials, index: int = 0, bucket: ImageBucket | None = None
) -> ImageFile:
    """Download a generated image into the spool: whole, decodable, in the requested format, never rewritten.

    Cached on prompt + seed and the image's index. Costs no credits. With `bucket`, an image whose URL is dead or
    unknown comes from there if it is published, with its SHA-256 verified.

    Raises:
        ContentFlagged: the service flagged it or delivered it black.
        ImageGone: its URL is dead. Generating with `refresh_cache=True` pays for it anew; with `replacing` as well,
            at most once.
        DownloadError: it could not be fetched or is not the requested image.

    Example:
        ```python
        generation = await generate_image(request, credentials, bucket=bucket)
        file = await download_image(generation, credentials, bucket=bucket)
        print(file.path, file.width, file.height)
        ```
    """
    step = current_step()
    async with credentials.open_client() as client:
        order = custody.Order(refresh=step.refresh)
        file = await custody.download(generation, index, client, Spool(), bucket, order=order)
    if step.results is not None:
        await step.results.write(file)
    return file


@task(
    name="upload-to-s3",
    task_run_name="upload {file.generation.request.label}",
    cache_policy=NO_CACHE,
    retries=_SETTINGS.retries,
    retry_delay_seconds=_SETTINGS.retry_delay_seconds,
    retry_condition_fn=is_worth_repeating,
)
async def upload_to_s3(file: ImageFile, bucket: ImageBucket) -> PublishedImage:
    """Publish an image under its key unless it is there already, with its JSON record beside it.

    Idempotent and never cached: the bucket itself is asked for the image. S3 verifies the SHA-256. The answer that
    `generate_image` has kept in the bucket is removed with the last image of its request. The file leaves the spool
    after `FLUX_PREFECT_KEEP_PUBLISHED_HOURS`.

    Raises:
        ImageChanged: the file's bytes are no longer those that were checked.
        BucketError: the bucket did not take it; the image stays in the spool.

    Example:
        ```python
        generation = await generate_image(request, credentials, bucket=bucket)
        file = await download_image(generation, credentials, bucket=bucket)
        published = await upload_to_s3(file, bucket)
        print(published.uri, published.created)
        ```
    """
    run = PublishingRun(flow_run_id=flow_run.id, flow_run_name=flow_run.name)
    published = await custody.publish(file, bucket, run)
    await custody.release(file, published, Spool())
    step_logger().log(
        current_step().news, "%s %s", "Published" if published.created else "Already there:", published.uri
    )
    return published
