"""The three tasks by themselves, as in the README's own flow; also as a process of its own, on one host of several."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prefect import flow
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.tasks import download_image, generate_image, upload_to_s3

__all__ = ["main", "publish_cover"]


@flow
async def publish_cover(
    request: ImageRequest, credentials: AimlApiCredentials, bucket: ImageBucket, index: int = 0
) -> PublishedImage:
    """Publish an image by three task runs."""
    generation = await generate_image(request, credentials, bucket=bucket)
    file = await download_image(generation, credentials, index, bucket=bucket)
    return await upload_to_s3(file, bucket)


def main(arguments: list[str]) -> int:
    """Publish the image of a prompt to a prefix, with results in a folder of this host's own."""
    prompt, prefix, lease_seconds, results = arguments
    bucket = ImageBucket(bucket_name="images", prefix=prefix, lease_seconds=float(lease_seconds))
    request = ImageRequest(prompt=prompt, seed=7, aspect_ratio="1:1")
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: Path(results)}):
        asyncio.run(publish_cover(request, AimlApiCredentials.from_env(), bucket))
    return 0
