"""The block classes that Prefect loads at start-up, through the entry point `prefect.collections`."""

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials

__all__ = ["AimlApiCredentials", "ImageBucket"]
