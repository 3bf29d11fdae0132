"""The bucket that images are published to, as a Prefect block over boto3.

Works with any S3 server that verifies SHA-256 checksums and refuses a second write under `If-None-Match: *`.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, TypeVar
from urllib.parse import quote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from prefect.blocks.core import Block, UnknownBlockType
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

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.keys import (
    DEFAULT_KEY_TEMPLATE,
    check_key_template,
    clean_prefix,
    object_key,
    sidecar_key,
)
from flux_prefect.bucket.published_image import ImageMetadata, PublishedImage, PublishingRun, write_sidecar
from flux_prefect.concurrency import run_in_thread
from flux_prefect.errors import (
    BucketAccessDenied,
    BucketError,
    BucketMissing,
    BucketUnavailable,
    ImageChanged,
    KeyOccupied,
    SpoolUnreadable,
)
from flux_prefect.host.spool import ImageFile
from flux_prefect.local_files import explain_os_error

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client
    from types_boto3_s3.type_defs import HeadObjectOutputTypeDef

__all__ = ["ImageBucket", "PublishedImage", "PublishingRun"]

_Result = TypeVar("_Result")

_TIMES_OVER = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted"}
_ACCESS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403"}
_CHECKSUM = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "BadChecksum"}
_HTTP_SERVER_ERROR, _HTTP_NOT_IMPLEMENTED = 500, 501
_CHUNK = 1024 * 1024
_AWS_BUCKET, _AWS_CREDENTIALS = "s3-bucket", "aws-credentials"  # types of saved blocks that prefect-aws has


@dataclass(frozen=True)
class _AwsAccess:
    """What a credentials block of prefect-aws says of a connection: keys, profile or assumed role, client options.

    Attributes:
        reference: what stands for the saved block in a flow's parameters; None where it is not saved.
        open_session: makes the session. Where the block assumes a role, one call to STS.
        options: arguments of `session.client`, such as endpoint_url and verify.
    """

    reference: str | None
    open_session: Callable[[], boto3.session.Session] = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)


class ImageBucket(WritableFileSystem):
    """An S3 bucket (or a prefix in one) to publish images to. Also a place for Prefect results.

    Without keys boto3's own chain decides: environment, profile, role. `AWS_ENDPOINT_URL_S3` and `AWS_DEFAULT_REGION`
    are obeyed where `endpoint_url` and `region_name` are empty.

    Example:
        Load a stored bucket and look for an image:
        ```python
        from flux_prefect.bucket.image_bucket import ImageBucket

        bucket = ImageBucket.load("BLOCK_NAME")
        ```
    """

    _block_type_name: ClassVar[str | None] = "Image Bucket"
    _block_type_slug: ClassVar[str | None] = "image-bucket"
    # The logo that Prefect itself hosts for file systems.
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl(str(LocalFileSystem._logo_url))  # noqa: SLF001 - Prefect's own protocol
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://boto3.amazonaws.com/v1/documentation/api/latest/guide/credentials.html"
    )

    bucket_name: str = Field(min_length=1, description="The bucket's name, without s3://.")
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
    public_base_url: str | None = Field(
        default=None,
        title="Public base URL",
        description="Where the bucket's root can be read by the public, such as a CDN. Keys are appended.",
    )
    cache_control: str | None = Field(
        default="public, max-age=31536000, immutable",
        description="The Cache-Control header of published images. A key's bytes never change.",
    )
    storage_class: str | None = Field(default=None, description="The S3 storage class, such as STANDARD_IA.")
    server_side_encryption: Literal["AES256", "aws:kms"] | None = Field(
        default=None, description="Encryption at rest. Default: the bucket's own setting."
    )
    kms_key_id: str | None = Field(default=None, title="KMS key ID", description="Goes with aws:kms.")
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

    _checked: str | None = PrivateAttr(default=None)
    _client: Any = PrivateAttr(default=None)
    _access: _AwsAccess | None = PrivateAttr(default=None)
    _client_lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def __getstate__(self) -> dict[Any, Any]:
        # A client and a lock stay in their process: Dask and Ray pickle what tasks are given.
        state = super().__getstate__()
        private = state["__pydantic_private__"] or {}
        kept = {name: value for name, value in private.items() if name not in {"_client", "_client_lock"}}
        return {**state, "__pydantic_private__": kept}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._client, self._client_lock = None, threading.Lock()

    @field_validator("bucket_name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if "/" in name or ":" in name:
            raise ValueError(f"bucket_name {name!r} is no plain name: use ImageBucket.from_uri for s3://name/prefix")
        return name

    @field_validator("prefix")
    @classmethod
    def _safe_prefix(cls, prefix: str) -> str:
        return clean_prefix(prefix)

    @field_validator("key_template")
    @classmethod
    def _safe_template(cls, template: str) -> str:
        return check_key_template(template)

    @model_validator(mode="after")
    def _both_keys(self) -> ImageBucket:
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            raise ValueError("aws_access_key_id and aws_secret_access_key go together: give both or neither")
        return self

    @classmethod
    def from_uri(cls, uri: str) -> ImageBucket:
        """The bucket and prefix of `s3://name/prefix`; keys, region and endpoint from boto3's own chain.

        Raises:
            ValueError: it is no such address.
        """
        parts = urlsplit(uri)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"bucket {uri!r} is no S3 address: write it as s3://name or s3://name/prefix")
        return cls(bucket_name=parts.netloc, prefix=parts.path)

    @classmethod
    async def resolve(cls, bucket: Block | str) -> ImageBucket:
        """The block itself, the bucket of an `s3://` address, or the saved block of that name.

        Saved blocks of prefect-aws do as well: an `S3Bucket` itself or as `s3-bucket/NAME`, and the keys of an
        `AwsCredentials` as `s3://NAME@bucket/prefix`.

        Raises:
            ValueError: it is neither an address nor the name of a saved block.
        """
        if isinstance(bucket, ImageBucket):
            return bucket
        if isinstance(bucket, Block):
            return cls._from_aws_bucket(bucket)
        kind, _, name = bucket.partition("/")
        if kind == _AWS_BUCKET:
            return cls._from_aws_bucket(await _load_aws_block(_AWS_BUCKET, name))
        if "://" in bucket:
            return await cls._from_address(bucket)
        return await cls.aload(bucket)

    @classmethod
    async def _from_address(cls, address: str) -> ImageBucket:
        scheme, _, rest = address.partition("://")
        host, slash, path = rest.partition("/")
        name, at, host = host.rpartition("@")
        plain = cls.from_uri(f"{scheme}://{host}{slash}{path}")
        if not at:
            return plain
        if not name or ":" in name:  # which may be a key and its secret, so it is not repeated
            raise ValueError(
                "What stands before @ in bucket must be the name of a saved AWS Credentials block: "
                "write it as s3://block@name/prefix, and keep keys out of it"
            )
        access = _read_access(await _load_aws_block(_AWS_CREDENTIALS, name), reference=address)
        plain._access = access  # noqa: SLF001 - of this very class
        return plain

    @classmethod
    def _from_aws_bucket(cls, block: Any) -> ImageBucket:
        kind, name = block.get_block_type_slug(), block._block_document_name  # noqa: SLF001 - nowhere else is the name
        if kind != _AWS_BUCKET:
            raise ValueError(
                f"bucket is a block of type {kind}: give an Image Bucket, or the S3 Bucket of prefect-aws."
            )
        bucket = cls(bucket_name=block.bucket_name, prefix=block.bucket_folder)
        bucket._access = _read_access(block.credentials, reference=f"{_AWS_BUCKET}/{name}" if name else None)
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

    async def check_once(self) -> None:
        """`check`, unless this block has passed it before."""
        if self._checked != self.bucket_name:
            await self.check()

    async def check(self) -> None:
        """Prove that the bucket is there and the keys are good, before anything is paid for. One HEAD.

        Raises:
            BucketMissing, BucketAccessDenied, BucketUnavailable: with what to correct.
        """
        await self._run(lambda client: client.head_bucket(Bucket=self.bucket_name), "")
        self._checked = self.bucket_name

    def key_of(self, request: ImageRequest, fingerprint: str, index: int) -> str:
        """The key of one image in this bucket."""
        return object_key(request, fingerprint, index, prefix=self.prefix, template=self.key_template)

    async def find(self, request: ImageRequest, fingerprint: str, index: int) -> PublishedImage | None:
        """The image as published, or None. One HEAD, no cost at the image service.

        Raises:
            KeyOccupied: the key holds something that was not published as this image.
            BucketError: the bucket can't say.
        """
        return await self._head(self.key_of(request, fingerprint, index))

    async def list_keys(self, *, most: int) -> frozenset[str] | None:
        """All keys below the prefix, or None where there are more than `most`. A request a thousand keys.

        Raises:
            BucketError: they can't be listed.
        """

        def read(client: S3Client) -> frozenset[str] | None:
            keys: set[str] = set()
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket_name, Prefix=f"{self.prefix}/" if self.prefix else ""
            )
            for page in pages:
                keys.update(found["Key"] for found in page.get("Contents", ()))
                if len(keys) > most or (len(keys) == most and page["IsTruncated"]):
                    return None
            return frozenset(keys)

        return await self._run(read, self.prefix)

    async def publish(self, file: ImageFile, run: PublishingRun) -> PublishedImage:
        """Put an image under its key unless it is there already; its JSON record goes first.

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
        record_key = sidecar_key(key, file.sha256)
        published_at = datetime.now(timezone.utc)
        record = write_sidecar(file, key, published_at, run)

        def put(client: S3Client) -> str | None:
            self._put_new(client, record_key, record, content_type="application/json")
            with _open_image(file) as body:
                return self._put_new(
                    client,
                    key,
                    body,
                    content_type=file.content_type,
                    Metadata=ImageMetadata.of(file).headers(),
                    ChecksumSHA256=base64.b64encode(bytes.fromhex(file.sha256)).decode(),
                )

        etag = await self._run(put, key)
        if etag is None:
            there = await self._head(key)
            if there is None:
                raise BucketUnavailable(
                    f"{self.bucket_name}/{key} was there and is gone again: something deletes objects while they "
                    "are published. The image stays in the spool; run again."
                )
            return there
        return PublishedImage(
            bucket=self.bucket_name,
            key=key,
            uri=f"s3://{self.bucket_name}/{key}",
            url=self._public_url(key),
            etag=etag,
            sha256=file.sha256,
            size=file.size,
            content_type=file.content_type,
            width=file.width,
            height=file.height,
            fingerprint=generation.fingerprint,
            index=file.index,
            seed=generation.seed,
            sidecar_key=record_key,
            published_at=published_at,
            created=True,
        )

    async def read_image(self, image: PublishedImage) -> bytes:
        """The bytes of a published image, proved to be those that were published.

        Raises:
            ImageChanged: the object has other bytes.
            BucketError: it can't be read.
        """

        def read(client: S3Client) -> bytes:
            return client.get_object(Bucket=image.bucket, Key=image.key)["Body"].read()

        content = await self._run(read, image.key)
        if hashlib.sha256(content).hexdigest() != image.sha256:
            raise ImageChanged(f"{image.uri} no longer has the bytes that were published: its SHA-256 differs.")
        return content

    async def read_path(self, path: str) -> bytes:
        """The bytes of the object at `path` below the prefix.

        Raises:
            ValueError: no such object, or the path leaves the prefix.
        """
        key = self._result_key(path)

        def read(client: S3Client) -> bytes | None:
            try:
                return client.get_object(Bucket=self.bucket_name, Key=key)["Body"].read()
            except client.exceptions.NoSuchKey:
                return None

        content = await self._run(read, key)
        if content is None:
            raise self._missing(key)
        return content

    async def stream_path(self, path: str, receive: Callable[[int, Iterator[bytes]], None]) -> None:
        """Hand the object at `path` below the prefix to `receive`: its size, then its bytes piece by piece.

        `receive` runs in a thread, and what it raises comes out. Memory: a piece, 1 MiB.

        Raises:
            ValueError: no such object, or the path leaves the prefix.
            BucketError: it can't be read, or not to its end.
        """
        key = self._result_key(path)

        def read(client: S3Client) -> bool:
            try:
                found = client.get_object(Bucket=self.bucket_name, Key=key)
            except client.exceptions.NoSuchKey:
                return False
            with closing(found["Body"]) as body:
                receive(found["ContentLength"], body.iter_chunks(_CHUNK))
            return True

        if not await self._run(read, key):
            raise self._missing(key)

    async def write_path(self, path: str, content: bytes) -> None:
        """Put bytes at `path` below the prefix, replacing what is there. Atomic: readers see old or new.

        Raises:
            ValueError: the path leaves the prefix.
            BucketError: the bucket did not take it.
        """
        key = self._result_key(path)
        await self._run(lambda client: client.put_object(Bucket=self.bucket_name, Key=key, Body=content), key)

    async def put_file(self, path: str, file: BinaryIO, *, content_type: str, cache_control: str) -> None:
        """Put the rest of a seekable file at `path` below the prefix, replacing what is there.

        Atomic: readers see old or new. Streamed, so it costs no memory; the server verifies a SHA-256. At most 5 GB.

        Raises:
            ValueError: the path leaves the prefix.
            BucketError: the bucket did not take it.
        """
        key = self._result_key(path)

        def put(client: S3Client) -> None:
            client.put_object(
                Bucket=self.bucket_name,
                Key=key,
                Body=file,
                ContentType=content_type,
                CacheControl=cache_control,
                ChecksumAlgorithm="SHA256",
                **self.encryption,
            )

        await self._run(put, key)

    def _missing(self, key: str) -> ValueError:
        return ValueError(f"There is no object s3://{self.bucket_name}/{key}.")

    @property
    def encryption(self) -> dict[str, Any]:
        """What `put_object` is told of encryption."""
        options = {"ServerSideEncryption": self.server_side_encryption, "SSEKMSKeyId": self.kms_key_id}
        return {name: value for name, value in options.items() if value}

    def _result_key(self, path: str) -> str:
        relative = clean_prefix(path)
        if not relative:
            raise ValueError("path is empty: name an object below the bucket's prefix")
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def _public_url(self, key: str) -> str | None:
        return f"{self.public_base_url.rstrip('/')}/{quote(key)}" if self.public_base_url else None

    async def _head(self, key: str) -> PublishedImage | None:
        def head(client: S3Client) -> HeadObjectOutputTypeDef | None:
            try:
                return client.head_object(Bucket=self.bucket_name, Key=key)
            except ClientError as error:
                if _status(error) == 404 and _code(error) != "NoSuchBucket":  # noqa: PLR2004 - HTTP
                    return None
                raise

        found = await self._run(head, key)
        if found is None:
            return None
        try:
            metadata = ImageMetadata.read(found["Metadata"])
        except (KeyError, ValueError) as error:
            raise KeyOccupied(
                f"s3://{self.bucket_name}/{key} is there but was not published as an image "
                f"(its metadata lacks or spoils {error}). Remove it, or publish under another prefix."
            ) from error
        return PublishedImage(
            bucket=self.bucket_name,
            key=key,
            uri=f"s3://{self.bucket_name}/{key}",
            url=self._public_url(key),
            etag=found["ETag"].strip('"'),
            size=found["ContentLength"],
            content_type=found["ContentType"],
            sidecar_key=sidecar_key(key, metadata.sha256),
            published_at=found["LastModified"],
            created=False,
            **metadata.model_dump(),
        )

    def _put_new(
        self, client: S3Client, key: str, body: bytes | BinaryIO, *, content_type: str, **options: Any
    ) -> str | None:
        """Put an object where there is none; its ETag, or None where there is one already."""
        if "ChecksumSHA256" not in options:
            options["ChecksumAlgorithm"] = "SHA256"
        if self.cache_control:
            options["CacheControl"] = self.cache_control
        if self.storage_class:
            options["StorageClass"] = self.storage_class
        options |= self.encryption
        try:
            found = client.put_object(
                Bucket=self.bucket_name, Key=key, Body=body, ContentType=content_type, IfNoneMatch="*", **options
            )
        except ClientError as error:
            if _status(error) == 412:  # noqa: PLR2004 - HTTP: precondition failed
                return None
            raise
        return found["ETag"].strip('"')

    def perform(self, work: Callable[[S3Client], _Result], key: str) -> _Result:
        """Do work with the client, its errors told as this module tells them. Blocks: call it in a thread.

        Args:
            work: what to do.
            key: what is told to be its object.

        Raises:
            BucketError: the bucket did not do it, with what to correct.
        """
        where = f"s3://{self.bucket_name}/{key}".rstrip("/")
        try:
            return work(self._connect(where))
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise BucketAccessDenied(
                f"There are no S3 keys for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "a profile or a role, or fill them in on the ImageBucket block."
            ) from error
        except ClientError as error:
            raise self._translate(error, where) from error
        except BotoCoreError as error:
            raise BucketUnavailable(
                f"{where} can't be reached: {error}. Check endpoint_url or AWS_ENDPOINT_URL_S3."
            ) from error

    async def _run(self, work: Callable[[S3Client], _Result], key: str) -> _Result:
        return await run_in_thread(self.perform, work, key)

    def _connect(self, where: str) -> S3Client:
        try:
            return self.get_client()
        except ValueError as error:  # botocore's word for an endpoint that is no URL
            raise BucketError(
                f"{where} has no usable server: {error}. Correct endpoint_url or AWS_ENDPOINT_URL_S3."
            ) from error

    def _translate(self, error: ClientError, where: str) -> BucketError:
        code, status = _code(error), _status(error)
        said = f"{code}: {error.response.get('Error', {}).get('Message', '')}".rstrip(": ")
        # A HEAD has no body, so its error has no code but the status.
        if code == "NoSuchBucket" or (code == "404" and error.operation_name == "HeadBucket"):
            return BucketMissing(
                f"The bucket {self.bucket_name!r} does not exist at {self._server()}: create it, or correct its name."
            )
        if code in _CHECKSUM:
            return ImageChanged(f"The file for {where} changed since it was checked; S3 refused it ({said}).")
        if code in _ACCESS or status in {401, 403}:
            return BucketAccessDenied(
                f"{self._server()} refuses {error.operation_name} on {where} ({said}): check the keys, and that they "
                "allow s3:ListBucket, s3:GetObject and s3:PutObject, and with lease_seconds s3:DeleteObject."
            )
        if code == "NotImplemented" or status == _HTTP_NOT_IMPLEMENTED:
            return BucketError(
                f"{self._server()} does not know how to do {error.operation_name} on {where} as it was asked ({said}): "
                "leave out the fields of the Image Bucket block that it has no support for, such as storage_class, "
                "or use another server."
            )
        if code in _TIMES_OVER or code == "ConditionalRequestConflict" or status >= _HTTP_SERVER_ERROR:
            return BucketUnavailable(f"{self._server()} could not do {error.operation_name} on {where} now ({said}).")
        return BucketError(f"{self._server()} refused {error.operation_name} on {where} ({said}).")

    def _server(self) -> str:
        return str(self.get_client().meta.endpoint_url)


async def _load_aws_block(kind: str, name: str) -> Block:
    try:
        return await Block.aload(f"{kind}/{name}")
    except UnknownBlockType as error:
        raise ValueError(
            f"{kind}/{name} is a block of prefect-aws, which can't be loaded here: pip install prefect-aws."
        ) from error


def _read_access(credentials: Any, *, reference: str | None) -> _AwsAccess:
    options = credentials.aws_client_parameters.get_params_override()
    if credentials.region_name is not None:
        options["region_name"] = credentials.region_name
    return _AwsAccess(reference, credentials.get_boto3_session, options)


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


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
