"""Addresses and names of buckets: `s3://` addresses, saved blocks, and the blocks of prefect-aws."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import boto3
from prefect.blocks.core import Block, UnknownBlockType

__all__ = ["ACCESS_POINT", "AwsAccess", "Location", "locate_aws_block", "locate_text", "parse_address"]

_OUR_BUCKET = "image-bucket"
_AWS_BUCKET, _AWS_CREDENTIALS = "s3-bucket", "aws-credentials"  # types of saved blocks that prefect-aws has


ACCESS_POINT = re.compile(r"arn:aws[a-z-]*:s3:[a-z0-9-]+:[0-9]{12}:accesspoint[/:][a-z0-9-]{3,50}")
"""The ARN of an S3 access point, which stands for a bucket's name in every request."""


@dataclass(frozen=True)
class AwsAccess:
    """The connection that a credentials block of prefect-aws describes: keys, profile or role, client options.

    Attributes:
        reference: the text that stands for the saved block in a flow's parameters; None where it is not saved.
        open_session: opens the session. Where the block assumes a role, one call to STS.
        options: arguments of `session.client`, such as endpoint_url and verify.
    """

    reference: str | None
    open_session: Callable[[], boto3.session.Session] = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Location:
    """A bucket, a prefix in it, and the access to it.

    Attributes:
        bucket_name: the bucket.
        prefix: the prefix, as written.
        access: from a block of prefect-aws; None for boto3's own chain of credentials.
    """

    bucket_name: str
    prefix: str
    access: AwsAccess | None = None


def parse_address(uri: str) -> Location:
    """The bucket and the prefix of `s3://name/prefix`. The name may be an access point's ARN.

    Raises:
        ValueError: it is not such an address.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"bucket {uri!r} is no S3 address: write it as s3://name or s3://name/prefix")
    # An access point's name comes after a slash: s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/prefix.
    found = ACCESS_POINT.match(f"{parts.netloc}{parts.path}")
    if found is not None and f"{parts.netloc}{parts.path}"[found.end() : found.end() + 1] in {"", "/"}:
        return Location(found.group(), f"{parts.netloc}{parts.path}"[found.end() :])
    return Location(parts.netloc, parts.path)


async def locate_text(text: str) -> Location | str:
    """The bucket that an address or `s3-bucket/NAME` stands for, else the name of a saved Image Bucket block.

    Raises:
        ValueError: the block of prefect-aws that it names can't be loaded.
    """
    kind, _, name = text.partition("/")
    if kind == _OUR_BUCKET:
        return name
    if kind == _AWS_BUCKET:
        return locate_aws_block(await _load_aws_block(_AWS_BUCKET, name))
    if "://" in text:
        return await _locate_address(text)
    return text


def locate_aws_block(block: Any) -> Location:
    """The bucket of an S3 Bucket block of prefect-aws, with its folder as the prefix and the access that it holds.

    Raises:
        ValueError: it is a block of another type.
    """
    kind, name = block.get_block_type_slug(), block._block_document_name  # noqa: SLF001 - nowhere else is the name
    if kind != _AWS_BUCKET:
        raise ValueError(f"bucket is a block of type {kind}: give an Image Bucket, or the S3 Bucket of prefect-aws.")
    access = _read_access(block.credentials, reference=f"{_AWS_BUCKET}/{name}" if name else None)
    return Location(block.bucket_name, block.bucket_folder, access)


async def _locate_address(address: str) -> Location:
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    name, at, host = host.rpartition("@")
    plain = parse_address(f"{scheme}://{host}{slash}{path}")
    if not at:
        return plain
    if not name or ":" in name:  # which may be a key and its secret, so it is not repeated
        raise ValueError(
            "What stands before @ in bucket must be the name of a saved AWS Credentials block: "
            "write it as s3://block@name/prefix, and keep keys out of it"
        )
    access = _read_access(await _load_aws_block(_AWS_CREDENTIALS, name), reference=address)
    return Location(plain.bucket_name, plain.prefix, access)


async def _load_aws_block(kind: str, name: str) -> Block:
    try:
        return await Block.aload(f"{kind}/{name}")
    except UnknownBlockType as error:
        raise ValueError(
            f"{kind}/{name} is a block of prefect-aws, which can't be loaded here: pip install prefect-aws."
        ) from error


def _read_access(credentials: Any, *, reference: str | None) -> AwsAccess:
    options = credentials.aws_client_parameters.get_params_override()
    if credentials.region_name is not None:
        options["region_name"] = credentials.region_name
    return AwsAccess(reference, credentials.get_boto3_session, options)
