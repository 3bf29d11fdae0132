"""What Prefect loads at its start (entry point `prefect.collections`), so that it knows the saved blocks' classes."""

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials

__all__ = ["AimlApiCredentials", "ImageBucket"]
