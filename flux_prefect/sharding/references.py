"""References by which workers find the batch's bucket and account: names and addresses, never keys."""

from __future__ import annotations

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials

__all__ = ["reference_bucket", "reference_credentials"]


def reference_bucket(bucket: ImageBucket | str) -> str:
    """Return the name or address of a bucket.

    Raises:
        ValueError: the bucket is a block that is not saved.
    """
    if isinstance(bucket, str):
        return bucket
    if bucket._block_document_name is None:  # noqa: SLF001 - the name has no public attribute
        raise ValueError("bucket is a block that is not saved, so no worker can load it: save it, or use s3://name.")
    return bucket.reference


def reference_credentials(credentials: AimlApiCredentials | str | None) -> str | None:
    """Return the name of an account; None stands for the environment of each worker.

    Raises:
        ValueError: credentials is a block that is not saved.
    """
    if credentials is None or isinstance(credentials, str):
        return credentials
    if credentials._block_document_name is None:  # noqa: SLF001 - the name has no public attribute
        raise ValueError("credentials is a block that is not saved, so no worker can load it: save it first.")
    return credentials._block_document_name  # noqa: SLF001 - as above
