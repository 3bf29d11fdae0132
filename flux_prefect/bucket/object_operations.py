"""Every request to S3: reading, writing, listing, copying and deleting objects of one bucket.

All of the package's writes pass through `ObjectOperations`, so that encryption, storage class and checksums are the
same on each. Errors of boto3 come out as this package's own, with what to correct.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    NoCredentialsError,
    PartialCredentialsError,
)

from flux_prefect.errors import (
    BucketAccessDenied,
    BucketError,
    BucketMissing,
    BucketUnavailable,
    ConditionsIgnored,
    ImageChanged,
)

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client
    from types_boto3_s3.type_defs import HeadObjectOutputTypeDef

__all__ = ["ObjectHeaders", "ObjectOperations", "Version"]

_CHUNK = 1024 * 1024
_PASSING = {
    "SlowDown",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "ConditionalRequestConflict",
}
_ACCESS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403"}
_CHECKSUM = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "BadChecksum"}
_NOT_FOUND, _CONFLICT, _PRECONDITION_FAILED, _SERVER_ERROR, _NOT_IMPLEMENTED = 404, 409, 412, 500, 501


@dataclass(frozen=True)
class ObjectHeaders:
    """The headers of an object that is written, beside those that the bucket's block sets on every object.

    Attributes:
        content_type: the MIME type.
        cache_control: how long others may keep it.
        metadata: stored with it, and read back by one HEAD.
    """

    content_type: str | None = None
    cache_control: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """The headers as arguments of boto3."""
        named = {"ContentType": self.content_type, "CacheControl": self.cache_control, "Metadata": self.metadata}
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True)
class Version:
    """The content of an object at one moment.

    Attributes:
        etag: names this version and no other, as long as no two writes have the same content.
        content: the bytes.
    """

    etag: str
    content: bytes


@dataclass(frozen=True)
class ObjectOperations:
    """The requests to one bucket. Every method blocks: call it in a thread.

    Every method but `server` raises:
        BucketMissing, BucketAccessDenied, BucketUnavailable, BucketError: with what to correct.

    Attributes:
        bucket_name: the bucket.
        connect: the client, made once and shared between threads.
        encryption: arguments of every write that name the encryption at rest.
        storage_class: of every object; None for the bucket's own.
    """

    bucket_name: str
    connect: Callable[[], S3Client]
    encryption: Mapping[str, str]
    storage_class: str | None

    @property
    def server(self) -> str:
        """The address of the S3 server."""
        return str(self.connect().meta.endpoint_url)

    def check_bucket(self) -> None:
        """Prove that the bucket exists and that the keys are good. One HEAD."""
        with self._request("") as client:
            client.head_bucket(**self._place)

    def head(self, key: str) -> HeadObjectOutputTypeDef | None:
        """The headers and metadata of an object, None where there is none. One HEAD."""
        return self._head(key)

    def head_with_checksum(self, key: str) -> HeadObjectOutputTypeDef | None:
        """As `head`, with the server's own checksum. Where a KMS key encrypts, it needs kms:Decrypt."""
        return self._head(key, ChecksumMode="ENABLED")

    def _head(self, key: str, **options: Any) -> HeadObjectOutputTypeDef | None:
        with self._request(key) as client:
            try:
                return client.head_object(Key=key, **self._place, **options)
            except ClientError as error:
                if _is_absence(error):
                    return None
                raise

    def read(self, key: str) -> Version | None:
        """An object whole, None where there is none.

        Raises:
            ImageChanged: its bytes are not those of the server's own checksum.
        """
        with self._request(key) as client:
            try:
                found = client.get_object(Key=key, **self._place)
            except client.exceptions.NoSuchKey:
                return None
            with closing(found["Body"]) as body:
                return Version(found["ETag"], body.read())

    def stream(self, key: str, receive: Callable[[int, Iterator[bytes]], None]) -> bool:
        """Hand an object's size and its pieces of 1 MiB to `receive`; False where there is no object.

        Raises:
            ImageChanged: its bytes are not those of the server's own checksum.
            Exception: what `receive` raises.
        """
        with self._request(key) as client:
            try:
                found = client.get_object(Key=key, **self._place)
            except client.exceptions.NoSuchKey:
                return False
            with closing(found["Body"]) as body:
                receive(found["ContentLength"], body.iter_chunks(_CHUNK))
            return True

    def list_keys(self, prefix: str, *, most: int) -> frozenset[str] | None:
        """All keys that begin with `prefix`, None where there are more than `most`. One request a thousand keys."""
        with self._request(prefix) as client:
            keys: set[str] = set()
            for page in client.get_paginator("list_objects_v2").paginate(Prefix=prefix, **self._place):
                keys.update(found["Key"] for found in page.get("Contents", ()))
                if len(keys) > most or (len(keys) == most and page["IsTruncated"]):
                    return None
            return frozenset(keys)

    def put(self, key: str, body: bytes | BinaryIO, headers: ObjectHeaders) -> None:
        """Write an object, replacing the one that is there. Atomic: readers get the old object or the new one.

        Raises:
            ImageChanged: the server received other bytes than were sent.
        """
        with self._request(key) as client:
            self._put(client, key, body, headers)

    def put_new(
        self, key: str, body: bytes | BinaryIO, headers: ObjectHeaders, *, sha256: str | None = None
    ) -> str | None:
        """Write an object where there is none.

        Args:
            key: the object's key.
            body: the content; of a file, all from its position to its end.
            headers: the object's headers.
            sha256: the digest that the content must have, hex. None: computed from the content.

        Returns:
            The new ETag without quotes, None where there is an object already.

        Raises:
            ImageChanged: the content has another SHA-256.
            ConditionsIgnored: the server has no conditional writes.
        """
        with self._request(key) as client:
            try:
                return self._put(client, key, body, headers, sha256=sha256, IfNoneMatch="*").strip('"')
            except ClientError as error:
                if _status(error) == _PRECONDITION_FAILED:
                    return None
                raise

    def put_over(self, key: str, body: bytes, headers: ObjectHeaders, *, etag: str | None) -> str | None:
        """Write an object over the version with this ETag; None: where there is no object.

        Returns:
            The new ETag, None where another version is there or another writer is at work.

        Raises:
            ConditionsIgnored: the server has no conditional writes.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with self._request(key) as client:
            try:
                return self._put(client, key, body, headers, **condition)
            except ClientError as error:
                if _is_refusal(error):
                    return None
                if _status(error) == _NOT_IMPLEMENTED:
                    raise self.conditions_ignored() from error
                raise

    def copy(self, key: str, target: str) -> None:
        """Copy an object to another key, replacing what is there. Headers and metadata are copied with it."""
        source = {"Bucket": self.bucket_name, "Key": key}
        with self._request(key) as client:
            client.copy_object(Key=target, CopySource=source, **self._place, **self._at_rest)  # type: ignore[arg-type]

    def delete(self, key: str) -> None:
        """Delete an object. One that is not there is no error."""
        with self._request(key) as client:
            client.delete_object(Key=key, **self._place)

    def delete_version(self, key: str, etag: str) -> None:
        """Delete the version of an object with this ETag, and leave any other.

        A server may ignore or refuse conditions on deletion, and then the object is deleted whatever its version:
        only for a caller that knows the version to be its own.
        """
        with self._request(key) as client:
            try:
                client.delete_object(Key=key, IfMatch=etag, **self._place)
            except ClientError as error:
                if _status(error) == _NOT_IMPLEMENTED:
                    client.delete_object(Key=key, **self._place)
                elif not _is_refusal(error):
                    raise

    def conditions_ignored(self) -> ConditionsIgnored:
        """The error for a server that has no conditional writes or ignores them."""
        return ConditionsIgnored(
            f"{self.server} does not keep to conditional writes (If-None-Match, If-Match) in the bucket "
            f"{self.bucket_name!r}, and leases need them: leave lease_seconds of the ImageBucket block empty and "
            "publish from one machine, or use an S3 server that has them."
        )

    @property
    def _place(self) -> dict[str, Any]:
        return {"Bucket": self.bucket_name}

    @property
    def _at_rest(self) -> dict[str, Any]:
        return {**self.encryption, **({"StorageClass": self.storage_class} if self.storage_class else {})}

    def _put(
        self,
        client: S3Client,
        key: str,
        body: bytes | BinaryIO,
        headers: ObjectHeaders,
        *,
        sha256: str | None = None,
        **condition: str,
    ) -> str:
        digest = bytes.fromhex(sha256) if sha256 is not None else _digest(body)
        arguments: dict[str, Any] = {**self._place, **self._at_rest, **headers.arguments(), **condition}
        # As a header, also over TLS: boto3's own checksums travel in a trailer there, which some servers refuse.
        arguments["ChecksumSHA256"] = base64.b64encode(digest).decode()
        return client.put_object(Key=key, Body=body, **arguments)["ETag"]

    @contextmanager
    def _request(self, key: str) -> Iterator[S3Client]:
        where = f"s3://{self.bucket_name}/{key}".rstrip("/")
        try:
            yield self._connected(where)
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise BucketAccessDenied(
                f"There are no S3 keys for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "a profile or a role, or fill them in on the ImageBucket block."
            ) from error
        except ClientError as error:
            raise self._translate(error, where) from error
        except FlexibleChecksumError as error:
            raise ImageChanged(f"The bytes of {where} are not those of the server's own checksum.") from error
        except BotoCoreError as error:
            raise BucketUnavailable(
                f"{where} can't be reached: {error}. Check endpoint_url or AWS_ENDPOINT_URL_S3."
            ) from error

    def _connected(self, where: str) -> S3Client:
        try:
            return self.connect()
        except ValueError as error:  # botocore's type for an endpoint that is no URL
            raise BucketError(
                f"{where} has no usable server: {error}. Correct endpoint_url or AWS_ENDPOINT_URL_S3."
            ) from error

    def _translate(self, error: ClientError, where: str) -> BucketError:
        code, status, operation = _code(error), _status(error), error.operation_name
        answer = f"{code}: {error.response.get('Error', {}).get('Message', '')}".rstrip(": ")
        # A HEAD has no body, so its error has no code but the status.
        if code == "NoSuchBucket" or (code == "404" and operation == "HeadBucket"):
            return BucketMissing(
                f"The bucket {self.bucket_name!r} does not exist at {self.server}: create it, or correct its name."
            )
        if code in _CHECKSUM:
            return ImageChanged(f"The file for {where} changed since it was checked; S3 refused it ({answer}).")
        if code in _ACCESS or status in {401, 403}:
            return BucketAccessDenied(
                f"{self.server} refuses {operation} on {where} ({answer}): check the keys, and that they "
                "allow s3:ListBucket, s3:GetObject and s3:PutObject, and with lease_seconds s3:DeleteObject."
            )
        if code == "NotImplemented" or status == _NOT_IMPLEMENTED:
            return BucketError(
                f"{self.server} does not support {operation} on {where} as requested ({answer}): "
                "clear the fields of the Image Bucket block that it has no support for, such as storage_class, "
                "or use another server."
            )
        if code in _PASSING or status >= _SERVER_ERROR:
            return BucketUnavailable(f"{self.server} could not do {operation} on {where} now ({answer}).")
        return BucketError(f"{self.server} refused {operation} on {where} ({answer}).")


def _digest(body: bytes | BinaryIO) -> bytes:
    """The SHA-256 of bytes, or of a file from its position to its end; the position stays."""
    if isinstance(body, bytes):
        return hashlib.sha256(body).digest()
    start, digest = body.tell(), hashlib.sha256()
    while piece := body.read(_CHUNK):
        digest.update(piece)
    body.seek(start)
    return digest.digest()


def _is_absence(error: ClientError) -> bool:
    return _status(error) == _NOT_FOUND and _code(error) != "NoSuchBucket"


def _is_refusal(error: ClientError) -> bool:
    """Whether a condition was not met: no such version any more, another writer at this moment, another version."""
    return _is_absence(error) or _status(error) in {_CONFLICT, _PRECONDITION_FAILED}


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
