"""Publish the images of one request.

From a shell: `python -m flux_prefect.flows.publish_image "a lighthouse at dusk" --bucket s3://name/prefix --seed 7`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, cast

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import ValidationError

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.cli.terminal import FAILED, add_connection_arguments, run_to_state
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice
from flux_prefect.money.budget import describe_credits
from flux_prefect.pipeline import Production, check_ready, produce_image
from flux_prefect.seeds import with_seed
from flux_prefect.tables.table import explain_invalid

__all__ = ["main", "publish_image"]


@flow(name="publish-image", flow_run_name="publish {request.label}")
async def publish_image(
    request: ImageRequest,
    bucket: BucketChoice,
    credentials: CredentialsChoice = None,
) -> list[PublishedImage]:
    """Have the 1 to 4 images of one request in a bucket; what is there already costs nothing.

    Args:
        request: What to generate. Without a seed, one is drawn from the run and recorded.
        bucket: s3://name/prefix, or a saved Image Bucket block or its name.
        credentials: A saved AIMLAPI Credentials block or its name. Empty: AIMLAPI_KEY of the environment.

    Returns:
        The images as they stand in the bucket, in the service's order.

    Raises:
        FluxError: an image failed. The others of the request are published all the same.

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
    cost = _tell_cost(production)
    if production.error is not None:
        state: State[Any] = Failed(
            message=f"{production.error.message} Cost of this run: {cost}.", data=production.error
        )
    else:
        images = [outcome.image for outcome in production.images if outcome.image is not None]
        state = Completed(message=f"{images[0].uri}, {cost}", data=images)
    # A state, so that the run's page shows the message; whoever calls the flow gets what is inside.
    return cast("list[PublishedImage]", state)


def _tell_cost(production: Production) -> str:
    told = describe_credits(production.credits_used)
    if production.unpriced_calls:
        told += f" and {production.unpriced_calls} billed calls whose cost the service did not say"
    if production.open_calls:
        ids = ", ".join(call.client_request_id for call in production.open_calls)
        told += f"; billed or possibly billed without an image: {ids}"
    return told


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 0 only where the run is Completed."""
    parser = argparse.ArgumentParser(
        prog="python -m flux_prefect.flows.publish_image", description="Publish one request's images."
    )
    parser.add_argument("prompt", help="what the image shows")
    options = [name for name in ImageRequest.model_fields if name != "prompt"]
    for name in options:
        parser.add_argument(f"--{name.replace('_', '-')}", help=ImageRequest.model_fields[name].description)
    add_connection_arguments(parser)
    given = vars(parser.parse_args(arguments))
    fields = {name: given[name] for name in options if given[name] is not None}
    try:
        request = ImageRequest.model_validate({"prompt": given["prompt"], **fields})
    except ValidationError as error:
        parser.error(explain_invalid(error))
    state = run_to_state(publish_image(request, given["bucket"], given["credentials"], return_state=True))
    if not state.is_completed():
        print(f"{state.name}: {state.message}", file=sys.stderr)
        return FAILED
    for image in state.result():
        print(image.uri if image.url is None else f"{image.uri}  {image.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
