"""A manifest against its bucket: what is there as it was written down, and how what is not comes back.

Only what the manifest says is looked for; objects that it does not name are left alone.
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
    """What stands under one image's key."""

    model_config = ConfigDict(frozen=True)

    finding: Finding = Field(
        description=(
            "ok, missing, wrong_checksum where other bytes or something else stands there, missing_sidecar where the "
            "image is there without its record, unreadable where the bucket does not say."
        )
    )
    message: str = Field(default="", description="What differs.")


async def inspect_published(bucket: ImageBucket, image: PublishedImage, *, deep: bool) -> Inspection:
    """Compare an image and its record in the bucket with what a manifest says of them.

    Two HEADs: the size, the digest that was stored with the image, and the one that the server keeps, where it
    gives it. Takes a thread. Never raises for what the bucket answers.

    Args:
        bucket: whose keys are used; the image's own key is looked at, wherever the block would put it now.
        image: as the manifest has it.
        deep: read the image's bytes as well, once, in memory of a megabyte. The traffic may cost.
    """
    if image.bucket != bucket.bucket_name:
        return Inspection(finding="unreadable", message=f"it is in the bucket {image.bucket!r}, which was not given")
    return await anyio.to_thread.run_sync(_inspect, bucket, image, deep)


async def find_in_spool(bucket: ImageBucket, image: PublishedImage) -> ImageFile:
    """The image's very bytes from this host's spool, read and checked, ready to be published under its key.

    Raises:
        RepairImpossible: there are none that fit.
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
        raise RepairImpossible("this host's spool has other bytes of it")
    return ImageFile(**found.model_dump(), index=image.index, generation=generation)


def check_key(bucket: ImageBucket, request: ImageRequest, image: PublishedImage) -> None:
    """Prove that the block would publish an image to the very key that the manifest has.

    Raises:
        RepairImpossible: it would go elsewhere.
    """
    if bucket.key_of(request, image.fingerprint, image.index) != image.key:
        raise RepairImpossible("prefix or key_template of the bucket are not those that it was published with")


async def set_aside(bucket: ImageBucket, image: PublishedImage) -> str:
    """Free an image's key: copy what stands there to `replaced/` below the prefix, then remove it.

    Returns:
        The copy's key.

    Raises:
        BucketError: the bucket did not do it. Unless the copy is whole, the object stays where it is.
    """
    return await anyio.to_thread.run_sync(_set_aside, bucket, image)


def _inspect(bucket: ImageBucket, image: PublishedImage, deep: bool) -> Inspection:  # noqa: FBT001 - run_sync's way
    try:
        found = bucket.objects.head_with_checksum(image.key)
        if found is None:
            return Inspection(finding="missing")
        difference = _compare(found, image)
        if difference is None and deep:
            difference = _compare_bytes(bucket, image)
        if difference is not None:
            return Inspection(finding="wrong_checksum", message=difference)
        if bucket.objects.head(image.sidecar_key) is None:
            return Inspection(finding="missing_sidecar")
    except ImageChanged as error:
        return Inspection(finding="wrong_checksum", message=error.message)
    except BucketError as error:
        return Inspection(finding="unreadable", message=error.message)
    return Inspection(finding="ok")


def _compare(found: HeadObjectOutputTypeDef, image: PublishedImage) -> str | None:
    stored = found["Metadata"].get("flux-sha256")
    if stored is None:
        return "something that was not published as an image stands under its key"
    if stored != image.sha256:
        return f"it was published with the SHA-256 {stored[:16]}…, not {image.sha256[:16]}…"
    if found["ContentLength"] != image.size:
        return f"it has {found['ContentLength']:,} bytes, not {image.size:,}"
    kept = found.get("ChecksumSHA256", "")
    # One with a hyphen is of an object put in parts, and no digest of its bytes.
    if kept and "-" not in kept and base64.b64decode(kept).hex() != image.sha256:
        return "the server's own SHA-256 of it is another"
    return None


def _compare_bytes(bucket: ImageBucket, image: PublishedImage) -> str | None:
    digest = hashlib.sha256()

    def receive(_: int, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            digest.update(piece)

    if not bucket.objects.stream(image.key, receive):
        return "it was deleted at this moment"
    return None if digest.hexdigest() == image.sha256 else "its bytes have another SHA-256"


def _set_aside(bucket: ImageBucket, image: PublishedImage) -> str:
    name = f"{image.fingerprint}-{image.index}-{uuid4().hex}"
    copy = f"{bucket.prefix}/replaced/{name}".lstrip("/")
    try:
        bucket.objects.copy(image.key, copy)
        bucket.objects.delete(image.key)
    except BucketError as error:
        raise BucketError(
            f"{image.uri} can't be set aside: {error.message} The keys must allow s3:GetObject, s3:PutObject and "
            "s3:DeleteObject."
        ) from error
    return copy
