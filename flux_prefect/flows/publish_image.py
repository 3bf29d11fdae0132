"""Publish the images of one request."""

from __future__ import annotations

from typing import Any, cast

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice
from flux_prefect.money.budget import describe_credits
from flux_prefect.pipeline import Production, check_ready, produce_image
from flux_prefect.seeds import with_seed

__all__ = ["publish_image"]


@flow(name="publish-image", flow_run_name="publish {request.label}")
async def publish_image(
    request: ImageRequest,
    bucket: BucketChoice,
    credentials: CredentialsChoice = None,
) -> list[PublishedImage]:
    """Publish the 1 to 4 images of one request; images that are already published cost nothing.

    Args:
        request: What to generate. Without a seed, one is drawn from the run and recorded.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the environment.

    Returns:
        The published images, in the service's order.

    Raises:
        FluxError: an image failed. The other images of the request are still published.

    Example:
        ```python
        images = await publish_image(ImageRequest(prompt="a lighthouse at dusk", seed=7), "s3://images/covers")
        print(images[0].uri)
        ```
    """
    logger = get_run_logger()
    destination = await ImageBucket.resolve(bucket)
    account = await AimlApiCredentials.resolve(credentials)
    await check_ready(destination)
    await account.check()
    production = await produce_image(with_seed(request, str(flow_run.id), "image"), destination, account)
    for outcome in production.images:
        if outcome.image is not None:
            logger.info("Image %d %s: %s", outcome.index, outcome.status.value, outcome.image.uri)
        else:
            logger.error("Image %d %s: %s", outcome.index, outcome.status.value, outcome.error)
    cost = _describe_cost(production)
    if production.error is not None:
        state: State[Any] = Failed(
            message=f"{production.error.message} Cost of this run: {cost}.", data=production.error
        )
    else:
        images = [outcome.image for outcome in production.images if outcome.image is not None]
        state = Completed(message=f"{images[0].uri}, {cost}", data=images)
    # A state, so that the run's page shows the message; callers of the flow get the state's result.
    return cast("list[PublishedImage]", state)


def _describe_cost(production: Production) -> str:
    text = describe_credits(production.credits_used)
    if production.unpriced_calls:
        text += f" and {production.unpriced_calls} billed calls whose cost the service did not report"
    if production.open_calls:
        ids = ", ".join(call.client_request_id for call in production.open_calls)
        text += f"; billed or possibly billed without an image: {ids}"
    return text
