"""The bucket that images are published to, as a Prefect block over boto3.

Works with any S3 server that refuses a second write under `If-None-Match: *`. One that accepts no SHA-256 headers needs
`checksums="when_required"`.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal
from urllib.parse import quote

import boto3
from botocore.config import Config
from prefect.blocks.core import Block
from prefect.filesystems import LocalFileSystem, WritableFileSystem
from pydantic import (
    ConfigDict,
    Field,
    HttpUrl,
    PrivateAttr,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.keys import (
    DEFAULT_KEY_TEMPLATE,
    DEFAULT_RECORDS_PREFIX,
    check_key_template,
    check_records_apart,
    clean_prefix,
    object_key,
    record_key,
    sidecar_key,
)
from flux_prefect.bucket.object_operations import Checksums, ObjectHeaders, ObjectOperations
from flux_prefect.bucket.published_image import ImageMetadata, PublishedImage, PublishingRun, write_sidecar
from flux_prefect.bucket.resolving import (
    ACCESS_POINT,
    AwsAccess,
    Location,
    locate_aws_block,
    locate_text,
    parse_address,
)
from flux_prefect.concurrency import run_in_thread
from flux_prefect.errors import (
    BucketError,
    BucketUnavailable,
    ImageChanged,
    KeyOccupied,
    SpoolUnreadable,
)
from flux_prefect.host.spool import ImageFile
from flux_prefect.local_files import explain_os_error

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

__all__ = ["ImageBucket"]

_OF_THE_PROCESS = {"_client", "_client_lock", "_proof_lock"}
_WRITE_CHECK = "manifests/write-check.json"
_WRITE_CHECK_CONTENT = b'{"about": "proves that flux_prefect may write here; can be deleted at any time"}\n'
_TAG = re.compile(r"[\w\s+\-=.:/@]*")
_MOST_TAGS, _MOST_OF_A_TAG_KEY, _MOST_OF_A_TAG = 10, 128, 256


class ImageBucket(WritableFileSystem):
    """An S3 bucket (or a prefix in one) to publish images to. Also a place for Prefect results.

    Without keys boto3's own chain decides: environment, profile, role. `AWS_ENDPOINT_URL_S3` and `AWS_DEFAULT_REGION`
    are obeyed where `endpoint_url` and `region_name` are empty.

    Example:
        Load a stored bucket and look for an image in it:
        ```python
        from flux_prefect import ImageBucket, ImageRequest, find_published

        bucket = ImageBucket.load("BLOCK_NAME")
        request = ImageRequest(prompt="a lighthouse at dusk", seed=7)
        published = find_published.submit(request, bucket, credentials).result()
        ```
    """

    _block_type_name: ClassVar[str | None] = "Image Bucket"
    _block_type_slug: ClassVar[str | None] = "image-bucket"
    # The logo that Prefect itself hosts for file systems.
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl(str(LocalFileSystem._logo_url))  # noqa: SLF001 - Prefect's own protocol
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://boto3.amazonaws.com/v1/documentation/api/latest/guide/credentials.html"
    )

    bucket_name: str = Field(min_length=1, description="The bucket's name, without s3://, or an access point's ARN.")
    prefix: str = Field(default="", description="All keys begin with this, and never leave it.")
    endpoint_url: str | None = Field(
        default=None, title="Endpoint URL", description="The S3 server, where it is not AWS."
    )
    region_name: str | None = Field(default=None, description="The bucket's region. Default: boto3's own.")
    aws_access_key_id: str | None = Field(
        default=None, title="Access key ID", description="Leave empty to use boto3's own chain of credentials."
    )
    aws_secret_access_key: SecretStr | None = Field(
        default=None, title="Secret access key", description="Goes with the access key ID."
    )
    aws_session_token: SecretStr | None = Field(
        default=None, title="Session token", description="Goes with temporary keys."
    )
    key_template: str = Field(
        default=DEFAULT_KEY_TEMPLATE,
        description=(
            "The key below the prefix. Needs {fingerprint} and {index}; "
            "may use {extension}, {seed}, {aspect_ratio} and {model}."
        ),
    )
    records_prefix: str = Field(
        default=DEFAULT_RECORDS_PREFIX,
        description=(
            "Where the JSON record of each image goes, below the prefix. Records hold prompts, costs and runs: leave "
            "them out of what a bucket policy opens to the public."
        ),
    )
    public_base_url: str | None = Field(
        default=None,
        title="Public base URL",
        description="Where the bucket's root can be read by the public, such as a CDN. Keys are appended.",
    )
    cache_control: str | None = Field(
        default="public, max-age=31536000, immutable",
        description="The Cache-Control header of published images. A key's bytes never change.",
    )
    storage_class: str | None = Field(
        default=None,
        description=(
            "The S3 storage class, such as STANDARD_IA, of all that is written. GLACIER and DEEP_ARCHIVE are for the "
            "images alone, as manifests and records are read again."
        ),
    )
    server_side_encryption: Literal["AES256", "aws:kms"] | None = Field(
        default=None, description="Encryption at rest. Default: the bucket's own setting."
    )
    kms_key_id: str | None = Field(default=None, title="KMS key ID", description="Goes with aws:kms.")
    tags: dict[str, str] = Field(
        default_factory=dict, description="Tags of every object that is written, at most 10. Need s3:PutObjectTagging."
    )
    expected_bucket_owner: str | None = Field(
        default=None,
        description=(
            "The 12-digit AWS account that must own the bucket: requests to another account's bucket are refused."
        ),
    )
    checksums: Checksums = Field(
        default="when_supported",
        description=(
            "How the server verifies what it stores. when_supported: by a SHA-256 header. when_required: by an MD5, "
            "for servers that accept no checksum headers."
        ),
    )
    lease_seconds: float | None = Field(
        default=None,
        ge=5,
        le=600,
        title="Lease (seconds)",
        description=(
            "Set it where several machines publish to this bucket: one at a time then makes an image, and another "
            "takes over from a machine that is silent for so long. 60 is a good value, the same on all machines. "
            "Needs a server with conditional writes, and s3:DeleteObject. Empty: one machine only."
        ),
    )

    model_config = ConfigDict(hide_input_in_errors=True)  # the input of a bad block holds its keys

    _proven: tuple[str, str] | None = PrivateAttr(default=None)
    _client: Any = PrivateAttr(default=None)
    _access: AwsAccess | None = PrivateAttr(default=None)
    _client_lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _proof_lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def __getstate__(self) -> dict[Any, Any]:
        # A client and a lock stay in their process: Dask and Ray pickle what tasks are given.
        state = super().__getstate__()
        private = state["__pydantic_private__"] or {}
        kept = {name: value for name, value in private.items() if name not in _OF_THE_PROCESS}
        return {**state, "__pydantic_private__": kept}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._client, self._client_lock, self._proof_lock = None, threading.Lock(), threading.Lock()

    @field_validator("bucket_name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if ("/" in name or ":" in name) and not ACCESS_POINT.fullmatch(name):
            raise ValueError(
                f"bucket_name {name!r} is no plain name and no access point's ARN "
                "(arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME): use ImageBucket.from_uri for s3://name/prefix"
            )
        return name

    @field_validator("expected_bucket_owner")
    @classmethod
    def _valid_owner(cls, owner: str | None) -> str | None:
        if owner is not None and not re.fullmatch("[0-9]{12}", owner):
            raise ValueError(f"expected_bucket_owner {owner!r} is no AWS account: it has 12 digits")
        return owner

    @field_validator("tags")
    @classmethod
    def _valid_tags(cls, tags: dict[str, str]) -> dict[str, str]:
        if len(tags) > _MOST_TAGS:
            raise ValueError(f"S3 takes at most {_MOST_TAGS} tags an object, and tags has {len(tags)}")
        for key, value in tags.items():
            if not 1 <= len(key) <= _MOST_OF_A_TAG_KEY or len(value) > _MOST_OF_A_TAG:
                raise ValueError(
                    f"the tag {key[:40]!r} can't be stored: its name needs 1 to {_MOST_OF_A_TAG_KEY} characters, "
                    f"its value at most {_MOST_OF_A_TAG} characters"
                )
            if not _TAG.fullmatch(key + value):
                raise ValueError(
                    f"the tag {key!r} can't be stored: S3 takes letters, digits, spaces and + - = . _ : / @"
                )
        return tags

    @field_validator("prefix")
    @classmethod
    def _safe_prefix(cls, prefix: str) -> str:
        return clean_prefix(prefix)

    @field_validator("records_prefix")
    @classmethod
    def _safe_records_prefix(cls, prefix: str) -> str:
        if not (cleaned := clean_prefix(prefix)):
            raise ValueError("records_prefix is empty: records hold prompts and costs, and need a folder of their own")
        return cleaned

    @field_validator("key_template")
    @classmethod
    def _safe_template(cls, template: str) -> str:
        return check_key_template(template)

    @model_validator(mode="after")
    def _records_apart(self) -> ImageBucket:
        check_records_apart(self.records_prefix, self.key_template)
        return self

    @model_validator(mode="after")
    def _both_keys(self) -> ImageBucket:
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            raise ValueError("aws_access_key_id and aws_secret_access_key go together: give both or neither")
        return self

    @classmethod
    def from_uri(cls, uri: str) -> ImageBucket:
        """The bucket and prefix of `s3://name/prefix`; keys, region and endpoint from boto3's own chain.

        Raises:
            ValueError: it is not such an address.
        """
        return cls._at(parse_address(uri))

    @classmethod
    async def resolve(cls, bucket: Block | str) -> ImageBucket:
        """The block itself, the bucket of an `s3://` address, or the saved block `NAME` or `image-bucket/NAME`.

        Saved blocks of prefect-aws do as well: an `S3Bucket` itself or as `s3-bucket/NAME`, and the keys of an
        `AwsCredentials` as `s3://NAME@bucket/prefix`.

        Raises:
            ValueError: it is neither an address nor the name of a saved block.
        """
        if isinstance(bucket, ImageBucket):
            return bucket
        if isinstance(bucket, Block):
            return cls._at(locate_aws_block(bucket))
        found = await locate_text(bucket)
        return await cls.aload(found) if isinstance(found, str) else cls._at(found)

    @classmethod
    def _at(cls, location: Location) -> ImageBucket:
        bucket = cls(bucket_name=location.bucket_name, prefix=location.prefix)
        bucket._access = location.access
        return bucket

    @property
    def uri(self) -> str:
        """`s3://name/prefix`."""
        return f"s3://{self.bucket_name}/{self.prefix}".rstrip("/")

    @property
    def reference(self) -> str:
        """What `resolve` finds this bucket again by: the name of the saved block, else the address.

        It holds no keys, so those of a block that is not saved are lost on the way.
        """
        saved = self._access.reference if self._access is not None else self._block_document_name
        return saved or self.uri

    def get_client(self) -> S3Client:
        """The boto3 client of this block, made once (about 50 ms) and safe to share between threads."""
        with self._client_lock:
            if self._client is None:
                self._client = self._make_client()
            client: S3Client = self._client
            return client

    def _make_client(self) -> S3Client:
        config = Config(
            parameter_validation=False,  # a fifth of the CPU of a small call; the arguments are ours
            signature_version="s3v4",  # else presigned URLs of a custom endpoint use the old one
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=64,
            retries={"mode": "standard", "total_max_attempts": 3},
            request_checksum_calculation=self.checksums,
            response_checksum_validation=self.checksums,
        )
        if self._access is None:
            options: dict[str, Any] = {"endpoint_url": self.endpoint_url}
            session = boto3.session.Session(
                aws_access_key_id=self.aws_access_key_id,
                aws_secret_access_key=_reveal(self.aws_secret_access_key),
                aws_session_token=_reveal(self.aws_session_token),
                region_name=self.region_name,
            )
        else:
            options = dict(self._access.options)
            config = config.merge(options.pop("config", Config()))
            session = self._access.open_session()
        if not session.region_name:
            options.setdefault("region_name", "us-east-1")
        client: S3Client = session.client("s3", config=config, **options)
        return client

    async def check(self) -> None:
        """Prove that the bucket is there and the keys are good, before anything is paid for. One HEAD.

        Raises:
            BucketMissing, BucketAccessDenied, BucketUnavailable: with what to correct.
        """
        await run_in_thread(self.objects.check_bucket)

    async def prove_writable(self) -> None:
        """Prove, once for a block, that images can be written here, before anything is paid for. One small PUT.

        It shows missing permissions, checksums or tags that the server refuses, and a server without conditional
        writes. The first time in a prefix two PUTs, and `manifests/write-check.json` stays.

        Raises:
            BucketMissing, BucketAccessDenied, BucketUnavailable, ChecksumsRefused, ConditionsIgnored: with what to
                correct.
        """
        place = (self.bucket_name, self.prefix)

        def prove() -> None:
            with self._proof_lock:
                if self._proven != place:
                    self.objects.prove_writable(self._result_key(_WRITE_CHECK), _WRITE_CHECK_CONTENT)
                    self._proven = place

        if self._proven != place:
            await run_in_thread(prove)

    def key_of(self, request: ImageRequest, fingerprint: str, index: int) -> str:
        """The key of one image in this bucket."""
        return object_key(
            request,
            fingerprint,
            index,
            prefix=self.prefix,
            template=self.key_template,
            records_prefix=self.records_prefix,
        )

    async def find(self, request: ImageRequest, fingerprint: str, index: int) -> PublishedImage | None:
        """The image as published, or None. One HEAD, no cost at the image service.

        Raises:
            KeyOccupied: the key holds something that was not published as this image.
            BucketError: the bucket can't say.
        """
        return await self._head(self.key_of(request, fingerprint, index), fingerprint, index)

    async def list_keys(self, *, most: int) -> frozenset[str] | None:
        """All keys below the prefix, or None where there are more than `most`. A request a thousand keys.

        Raises:
            BucketError: they can't be listed.
        """
        prefix = f"{self.prefix}/" if self.prefix else ""
        return await run_in_thread(partial(self.objects.list_keys, prefix, most=most))

    async def publish(self, file: ImageFile, run: PublishingRun) -> PublishedImage:
        """Put an image under its key unless it is there already; its JSON record goes first, below `records_prefix`.

        Idempotent, and safe against any number of publishers at once: the first whole object wins and stays, and
        every publisher returns it. The server verifies the SHA-256 of what it stores. At most two PUTs and a HEAD.

        Raises:
            ImageChanged: the file's bytes are no longer those that were checked.
            SpoolUnreadable: the file can't be opened for now. It stays in the spool.
            KeyOccupied: the key holds something else.
            BucketError: the bucket did not take it. The file stays in the spool.
        """
        if not file.is_whole():
            raise _changed(file)
        generation = file.generation
        key = self.key_of(generation.request, generation.fingerprint, file.index)
        published_at = datetime.now(timezone.utc)
        record = write_sidecar(file, key, published_at, run)
        metadata = ImageMetadata.of(file, records=self.records_prefix)

        def put() -> str | None:
            self.objects.put_new(self._record_key(key, metadata), record, ObjectHeaders("application/json", "no-store"))
            headers = ObjectHeaders(file.content_type, self.cache_control, metadata.headers(), archivable=True)
            with _open_image(file) as body:
                return self.objects.put_new(key, body, headers, sha256=file.sha256)

        etag = await run_in_thread(put)
        if etag is None:
            there = await self._head(key, generation.fingerprint, file.index)
            if there is None:
                raise BucketUnavailable(
                    f"{self.bucket_name}/{key} was there and is gone again: something deletes objects while they "
                    "are published. The image stays in the spool; run again."
                )
            return there
        return self._describe(
            key,
            metadata,
            etag=etag,
            size=file.size,
            content_type=file.content_type,
            published_at=published_at,
            created=True,
        )

    async def read_image(self, image: PublishedImage) -> bytes:
        """The bytes of a published image, proved to be those that were published.

        Raises:
            ImageChanged: the object has other bytes.
            BucketError: it can't be read.
        """
        objects = replace(self.objects, bucket_name=image.bucket)
        found = await run_in_thread(objects.read, image.key)
        if found is None:
            raise BucketError(f"There is no object {image.uri}: it was deleted since it was published.")
        content = found.content
        if hashlib.sha256(content).hexdigest() != image.sha256:
            raise ImageChanged(f"{image.uri} no longer has the bytes that were published: its SHA-256 differs.")
        return content

    def record_keys(self, image: PublishedImage) -> tuple[str, ...]:
        """The keys that may hold the record of an image: of when it was published, and of today.

        They differ for images of 0.1.0, whose records can be moved to today's.
        """
        today = record_key(image.key, image.sha256, prefix=self.prefix, records_prefix=self.records_prefix)
        return tuple(dict.fromkeys((image.sidecar_key, today)))

    async def read_record(self, image: PublishedImage) -> dict[str, Any] | None:
        """The JSON record of a published image, None where there is none. One GET, of older images up to two.

        Raises:
            BucketError: it can't be read.
        """
        objects = replace(self.objects, bucket_name=image.bucket)
        for key in self.record_keys(image):
            if (found := await run_in_thread(objects.read, key)) is not None:
                return _parse_record(found.content)
        return None

    async def read_path(self, path: str) -> bytes:
        """The bytes of the object at `path` below the prefix.

        Raises:
            ValueError: no such object, or the path leaves the prefix.
        """
        key = self._result_key(path)
        found = await run_in_thread(self.objects.read, key)
        if found is None:
            raise self._missing(key)
        return found.content

    async def stream_path(self, path: str, receive: Callable[[int, Iterator[bytes]], None]) -> None:
        """Hand the object at `path` below the prefix to `receive`: its size, then its bytes piece by piece.

        `receive` runs in a thread, and what it raises comes out. Memory: a piece, 1 MiB.

        Raises:
            ValueError: no such object, or the path leaves the prefix.
            BucketError: it can't be read, or not to its end.
        """
        key = self._result_key(path)
        if not await run_in_thread(self.objects.stream, key, receive):
            raise self._missing(key)

    async def write_path(self, path: str, content: bytes) -> None:
        """Put bytes at `path` below the prefix, replacing what is there. Atomic: readers see old or new.

        Raises:
            ValueError: the path leaves the prefix.
            BucketError: the bucket did not take it.
        """
        key = self._result_key(path)
        await run_in_thread(self.objects.put, key, content, ObjectHeaders())

    async def put_file(self, path: str, file: BinaryIO, *, content_type: str, cache_control: str) -> None:
        """Put the rest of a seekable file at `path` below the prefix, replacing what is there.

        Atomic: readers see old or new. Streamed, so it costs no memory; the server verifies a SHA-256. At most 5 GB.

        Raises:
            ValueError: the path leaves the prefix.
            BucketError: the bucket did not take it.
        """
        headers = ObjectHeaders(content_type, cache_control)
        await run_in_thread(self.objects.put, self._result_key(path), file, headers)

    def _missing(self, key: str) -> ValueError:
        return ValueError(f"There is no object s3://{self.bucket_name}/{key}.")

    @property
    def objects(self) -> ObjectOperations:
        """The requests for this bucket's objects, by their whole keys. They block: call them in a thread."""
        encryption = {"ServerSideEncryption": self.server_side_encryption, "SSEKMSKeyId": self.kms_key_id}
        return ObjectOperations(
            bucket_name=self.bucket_name,
            connect=self.get_client,
            encryption={name: value for name, value in encryption.items() if value},
            storage_class=self.storage_class,
            tags=self.tags,
            owner=self.expected_bucket_owner,
            checksums=self.checksums,
        )

    def _result_key(self, path: str) -> str:
        relative = clean_prefix(path)
        if not relative:
            raise ValueError("path is empty: name an object below the bucket's prefix")
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def _record_key(self, key: str, metadata: ImageMetadata) -> str:
        if metadata.records is None:
            return sidecar_key(key, metadata.sha256)
        return record_key(key, metadata.sha256, prefix=self.prefix, records_prefix=metadata.records)

    def _public_url(self, key: str) -> str | None:
        return f"{self.public_base_url.rstrip('/')}/{quote(key)}" if self.public_base_url else None

    async def _head(self, key: str, fingerprint: str, index: int) -> PublishedImage | None:
        found = await run_in_thread(self.objects.head, key)
        if found is None:
            return None
        try:
            metadata = ImageMetadata.read(found["Metadata"])
        except (KeyError, ValueError) as error:
            raise KeyOccupied(
                f"s3://{self.bucket_name}/{key} is there but was not published as an image "
                f"(its metadata lacks or spoils {error}). Remove it, or publish under another prefix."
            ) from error
        if (metadata.fingerprint, metadata.index) != (fingerprint, index):
            raise KeyOccupied(
                f"s3://{self.bucket_name}/{key} holds another request's image (image {metadata.index} of "
                f"{metadata.fingerprint[:16]}…, not image {index} of {fingerprint[:16]}…): it was copied or renamed. "
                "Remove it, or publish under another prefix."
            )
        return self._describe(
            key,
            metadata,
            etag=found["ETag"].strip('"'),
            size=found["ContentLength"],
            content_type=found["ContentType"],
            published_at=found["LastModified"],
            created=False,
        )

    def _describe(self, key: str, metadata: ImageMetadata, **found: Any) -> PublishedImage:
        return PublishedImage(
            bucket=self.bucket_name,
            key=key,
            uri=f"s3://{self.bucket_name}/{key}",
            url=self._public_url(key),
            sidecar_key=self._record_key(key, metadata),
            **metadata.model_dump(exclude={"records"}),
            **found,
        )


def _parse_record(content: bytes) -> dict[str, Any] | None:
    try:
        record = from_json(content)
    except ValueError:  # not written by this package
        return None
    return record if isinstance(record, dict) else None


def _open_image(file: ImageFile) -> BinaryIO:
    try:
        return file.path.open("rb")
    except FileNotFoundError as error:
        raise _changed(file) from error
    except OSError as error:
        raise SpoolUnreadable(
            f"{file.path} can't be read {explain_os_error(error, 'make it readable for this user')}, then run again. "
            "It is paid for, and stays where it is."
        ) from error


def _changed(file: ImageFile) -> ImageChanged:
    return ImageChanged(
        f"{file.path} is gone or changed since it was checked: fetch it again with "
        "download_image.with_options(refresh_cache=True)."
    )


def _reveal(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
