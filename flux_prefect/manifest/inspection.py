"""Comparison of a manifest with its bucket, and the first steps of restoring what is missing or wrong.

Only objects that the manifest names are read or changed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.errors import BucketError, ImageChanged, RepairImpossible, SpoolUnreadable
from flux_prefect.host.spool import ImageFile, Spool

if TYPE_CHECKING:
    from types_boto3_s3.type_defs import HeadObjectOutputTypeDef

__all__ = ["Finding", "Inspection", "check_key", "find_in_spool", "inspect_published", "set_aside"]

Finding = Literal["ok", "missing", "wrong_checksum", "missing_sidecar", "unreadable"]


class Inspection(BaseModel):
    """The state of one image in its bucket."""

    model_config = ConfigDict(frozen=True)

    finding: Finding = Field(
        description=(
            "ok; missing; wrong_checksum: the key holds other bytes, or an object that is not an image of this "
            "package; missing_sidecar: the image exists without its record; unreadable: the bucket returned an error."
        )
    )
    message: str = Field(default="", description="The difference, or the bucket's error.")


async def inspect_published(bucket: ImageBucket, image: PublishedImage, *, deep: bool) -> Inspection:
    """Compare an image and its record in the bucket with their entry in a manifest.

    Sends two HEAD requests and compares the size, the digest stored with the image, and the server's own digest where
    there is one. Runs in a thread. Never raises an error of the bucket.

    Args:
        bucket: the bucket and its credentials. The key is the image's own, even if the block would now use another.
        image: the image as recorded in the manifest.
        deep: also read the image's bytes, once, in a megabyte of memory. The traffic may be charged.
    """
    if image.bucket != bucket.bucket_name:
        return Inspection(finding="unreadable", message=f"it is in another bucket, {image.bucket!r}")
    return await anyio.to_thread.run_sync(_inspect, bucket, image, deep)


async def find_in_spool(bucket: ImageBucket, image: PublishedImage) -> ImageFile:
    """Find the image's exact bytes in this host's spool, verified and ready to be published under its key.

    Raises:
        RepairImpossible: the spool does not have them, or the block would publish the image under another key.
    """
    spool = Spool()
    try:
        generation = spool.find_generation(image.fingerprint)
    except SpoolUnreadable as error:
        raise RepairImpossible(error.message) from error
    if generation is None:
        raise RepairImpossible("this host's spool has no record of it")
    check_key(bucket, generation.request, image)
    found = await anyio.to_thread.run_sync(spool.find_image, generation, image.index)
    if found is None:
        raise RepairImpossible("its file is not in this host's spool")
    if found.sha256 != image.sha256:
        raise RepairImpossible("this host's spool has different bytes of it")
    return ImageFile(**found.model_dump(), index=image.index, generation=generation)


def check_key(bucket: ImageBucket, request: ImageRequest, image: PublishedImage) -> None:
    """Verify that the block would publish an image under the key in the manifest.

    Raises:
        RepairImpossible: it would use another key.
    """
    if bucket.key_of(request, image.fingerprint, image.index) != image.key:
        raise RepairImpossible("prefix or key_template of the bucket differ from those that it was published with")


async def set_aside(bucket: ImageBucket, image: PublishedImage) -> str:
    """Free an image's key: copy the object there to `replaced/` below the prefix, then remove it.

    Returns:
        The copy's key.

    Raises:
        BucketError: the bucket refused. Without a complete copy, the object is not removed.
    """
    return await anyio.to_thread.run_sync(_set_aside, bucket, image)


def _inspect(bucket: ImageBucket, image: PublishedImage, deep: bool) -> Inspection:  # noqa: FBT001 - run_sync passes positional arguments
    try:
        found = bucket.objects.head_with_checksum(image.key)
        if found is None:
            return Inspection(finding="missing")
        difference = _compare(found, image)
        if difference is None and deep:
            difference = _compare_bytes(bucket, image)
        if difference is not None:
            return Inspection(finding="wrong_checksum", message=difference)
        if all(bucket.objects.head(key) is None for key in bucket.record_keys(image)):
            return Inspection(finding="missing_sidecar")
    except ImageChanged as error:
        return Inspection(finding="wrong_checksum", message=error.message)
    except BucketError as error:
        return Inspection(finding="unreadable", message=error.message)
    return Inspection(finding="ok")


def _compare(found: HeadObjectOutputTypeDef, image: PublishedImage) -> str | None:
    stored = found["Metadata"].get("flux-sha256")
    if stored is None:
        return "its key holds an object that was not published as an image"
    owner = (found["Metadata"].get("flux-fingerprint"), found["Metadata"].get("flux-index"))
    if owner != (image.fingerprint, str(image.index)):
        return "its key holds another request's image"
    if stored != image.sha256:
        return f"it was published with the SHA-256 {stored[:16]}…, not {image.sha256[:16]}…"
    if found["ContentLength"] != image.size:
        return f"it has {found['ContentLength']:,} bytes, not {image.size:,}"
    checksum = found.get("ChecksumSHA256", "")
    # A checksum with a hyphen belongs to a multipart upload, and is not a digest of the object's bytes.
    if checksum and "-" not in checksum and base64.b64decode(checksum).hex() != image.sha256:
        return "the server's own SHA-256 of it differs"
    return None


def _compare_bytes(bucket: ImageBucket, image: PublishedImage) -> str | None:
    digest = hashlib.sha256()

    def receive(_: int, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            digest.update(piece)

    if not bucket.objects.stream(image.key, receive):
        return "it was deleted during the audit"
    return None if digest.hexdigest() == image.sha256 else "the SHA-256 of its bytes differs"


def _set_aside(bucket: ImageBucket, image: PublishedImage) -> str:
    name = f"{image.fingerprint}-{image.index}-{uuid4().hex}"
    copy = f"{bucket.prefix}/replaced/{name}".lstrip("/")
    try:
        bucket.objects.copy(image.key, copy)
        bucket.objects.delete(image.key)
    except BucketError as error:
        raise BucketError(
            f"{image.uri} can't be moved to replaced/: {error.message} The keys must allow s3:GetObject, s3:PutObject "
            "and s3:DeleteObject."
        ) from error
    return copy
