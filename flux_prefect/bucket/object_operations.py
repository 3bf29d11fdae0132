"""Every request to S3: reading, writing, listing, copying and deleting objects of one bucket.

All of the package's writes pass through `ObjectOperations`, so that encryption, storage class, tags and checksums are
the same on each. Errors of boto3 come out as this package's own, with what to correct.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Literal
from urllib.parse import quote, urlencode

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
)

from flux_prefect.bucket.causes import explain_failure, explain_refusal
from flux_prefect.errors import (
    BucketAccessDenied,
    BucketError,
    BucketMissing,
    BucketUnavailable,
    ChecksumsRefused,
    ConditionsIgnored,
    ImageChanged,
)

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client
    from types_boto3_s3.type_defs import HeadObjectOutputTypeDef

__all__ = ["Checksums", "ObjectHeaders", "ObjectOperations", "Version"]

Checksums = Literal["when_supported", "when_required"]
"""`when_supported`: a SHA-256 header with every write. `when_required`: an MD5, which every S3 server knows."""

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
_ARCHIVES = {"GLACIER", "DEEP_ARCHIVE"}
_CHECKSUM_WORDS = ("checksum", "trailer", "x-amz-sdk", "aws-chunked")
_BAD_REQUEST, _UNAUTHORIZED, _FORBIDDEN = 400, 401, 403
_NOT_FOUND, _CONFLICT, _PRECONDITION_FAILED, _SERVER_ERROR, _NOT_IMPLEMENTED = 404, 409, 412, 500, 501


@dataclass(frozen=True)
class ObjectHeaders:
    """The headers of an object that is written, beside those that the bucket's block sets on every object.

    Attributes:
        content_type: the MIME type.
        cache_control: how long others may keep it.
        metadata: stored with it, and read back by one HEAD.
        archivable: whether an archive class may take it. False for what this package reads again.
    """

    content_type: str | None = None
    cache_control: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    archivable: bool = False

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
        storage_class: of every object; None for the bucket's own. An archive class is for images alone.
        tags: of every object.
        owner: the account that must own the bucket; None for any.
        checksums: how the server verifies the content of a write.
    """

    bucket_name: str
    connect: Callable[[], S3Client]
    encryption: Mapping[str, str] = field(default_factory=dict)
    storage_class: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    owner: str | None = None
    checksums: Checksums = "when_supported"

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

    def prove_writable(self, key: str, content: bytes) -> None:
        """Prove that an image could be written now: keys, checksums, encryption, tags and conditional writes.

        One PUT; the first time two, and an object stays under the key.

        Raises:
            ChecksumsRefused: the server accepts no checksum headers.
            ConditionsIgnored: the server has no conditional writes.
        """
        headers = ObjectHeaders("application/json", "no-store")
        if self.put_new(key, content, headers) is not None and self.put_new(key, content, headers) is not None:
            raise self.conditions_ignored()

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
        arguments: dict[str, Any] = {
            **self._place,
            **self._stored(archivable=False),
            "CopySource": {"Bucket": self.bucket_name, "Key": key},
        }
        if self.tags:
            arguments["TaggingDirective"] = "REPLACE"
        if self.owner is not None:
            arguments["ExpectedSourceBucketOwner"] = self.owner
        with self._request(key) as client:
            client.copy_object(Key=target, **arguments)

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
            f"{self.server} does not support conditional writes (If-None-Match, If-Match) in the bucket "
            f"{self.bucket_name!r}. Publishing needs the first, so that no publisher replaces what another has "
            "published: use an S3 server that has them. Where only If-Match is missing, leave lease_seconds of the "
            "Image Bucket block empty and publish from one machine."
        )

    @property
    def _place(self) -> dict[str, Any]:
        place = {"Bucket": self.bucket_name}
        return place if self.owner is None else {**place, "ExpectedBucketOwner": self.owner}

    def _stored(self, *, archivable: bool) -> dict[str, Any]:
        stored = dict(self.encryption)
        if self.storage_class and (archivable or self.storage_class not in _ARCHIVES):
            stored["StorageClass"] = self.storage_class
        if self.tags:
            stored["Tagging"] = urlencode(self.tags, quote_via=quote, safe="")
        return stored

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
        arguments: dict[str, Any] = {
            **self._place,
            **self._stored(archivable=headers.archivable),
            **headers.arguments(),
            **condition,
            **self._digests(key, body, sha256),
        }
        try:
            return client.put_object(Key=key, Body=body, **arguments)["ETag"]
        except ClientError as error:
            if condition and _refuses_conditions(error):
                raise self.conditions_ignored() from error
            if self.checksums == "when_supported" and _refuses_checksums(error):
                raise self._checksums_refused(error, key) from error
            raise

    def _digests(self, key: str, body: bytes | BinaryIO, sha256: str | None) -> dict[str, str]:
        """The digest that the server verifies, as a header.

        boto3's own checksums travel in a trailer over TLS, which some servers refuse.
        """
        if self.checksums == "when_supported":
            digest = bytes.fromhex(sha256) if sha256 is not None else _hash(body, hashlib.sha256())[0]
            return {"ChecksumSHA256": base64.b64encode(digest).decode()}
        digest, md5 = _hash(body, hashlib.sha256(), hashlib.md5(usedforsecurity=False))
        if sha256 is not None and digest.hex() != sha256:
            raise ImageChanged(f"The file for s3://{self.bucket_name}/{key} changed since it was checked.")
        return {"ContentMD5": base64.b64encode(md5).decode()}

    def _checksums_refused(self, error: ClientError, key: str) -> ChecksumsRefused:
        return ChecksumsRefused(
            f"{self.server} refuses the checksum header of a write to s3://{self.bucket_name}/{key} "
            f"({_answer(error)}): set checksums of the Image Bucket block to when_required. If that changes nothing, "
            "check the keys."
        )

    @contextmanager
    def _request(self, key: str) -> Iterator[S3Client]:
        where = f"s3://{self.bucket_name}/{key}".rstrip("/")
        try:
            yield self._connected(where)
        except ClientError as error:
            raise self._explain(error, where) or self._translate(error, where) from error
        except FlexibleChecksumError as error:
            raise ImageChanged(f"The bytes of {where} are not those of the server's own checksum.") from error
        except BotoCoreError as error:
            raise explain_failure(error, where) from error

    def _connected(self, where: str) -> S3Client:
        try:
            return self.connect()
        except ValueError as error:  # botocore's type for an endpoint that is no URL
            raise BucketError(
                f"{where} has no usable server: {error}. Correct endpoint_url or AWS_ENDPOINT_URL_S3."
            ) from error

    def _explain(self, error: ClientError, where: str) -> BucketError | None:
        message = str(error.response.get("Error", {}).get("Message", ""))
        return explain_refusal(_code(error), message, self.server, f"{error.operation_name} on {where}")

    def _translate(self, error: ClientError, where: str) -> BucketError:
        code, status, operation, answer = _code(error), _status(error), error.operation_name, _answer(error)
        # A HEAD has no body, so its error has no code but the status.
        if code == "NoSuchBucket" or (code == "404" and operation == "HeadBucket"):
            return BucketMissing(
                f"The bucket {self.bucket_name!r} does not exist at {self.server}: create it, or correct its name."
            )
        if code in _CHECKSUM:
            return ImageChanged(f"The file for {where} changed since it was checked; S3 refused it ({answer}).")
        if code in _ACCESS or status in {_UNAUTHORIZED, _FORBIDDEN}:
            return BucketAccessDenied(
                f"{self.server} refuses {operation} on {where} ({answer}): check the keys, and that they "
                "allow s3:ListBucket, s3:GetObject and s3:PutObject, and with lease_seconds s3:DeleteObject."
            )
        if code == "NotImplemented" or status == _NOT_IMPLEMENTED:
            return BucketError(
                f"{self.server} does not support {operation} on {where} as requested ({answer}): "
                "clear the fields of the Image Bucket block that it has no support for, such as storage_class or tags, "
                "or use another server. Publishing also needs conditional writes (If-None-Match)."
            )
        if code in _PASSING or status >= _SERVER_ERROR:
            return BucketUnavailable(f"{self.server} could not do {operation} on {where} now ({answer}).")
        return BucketError(f"{self.server} refused {operation} on {where} ({answer}).")


def _hash(body: bytes | BinaryIO, *hashes: hashlib._Hash) -> list[bytes]:
    """The digests of bytes, or of a file from its position to its end; the position stays."""
    file = io.BytesIO(body) if isinstance(body, bytes) else body
    start = file.tell()
    while piece := file.read(_CHUNK):
        for each in hashes:
            each.update(piece)
    file.seek(start)
    return [each.digest() for each in hashes]


def _refuses_conditions(error: ClientError) -> bool:
    """Whether the server names the condition as what it does not support."""
    named = f"{error.response.get('Error', {}).get('Header', '')} {_answer(error)}".lower()
    return _status(error) == _NOT_IMPLEMENTED and any(name in named for name in ("if-none-match", "if-match"))


def _refuses_checksums(error: ClientError) -> bool:
    """Whether a server does not know the checksum header. Wrong keys are a 403; some servers answer 401 to it."""
    if _code(error) in _CHECKSUM:
        return False
    status, answer = _status(error), _answer(error).lower()
    return status == _UNAUTHORIZED or (
        status in {_BAD_REQUEST, _NOT_IMPLEMENTED} and any(word in answer for word in _CHECKSUM_WORDS)
    )


def _is_absence(error: ClientError) -> bool:
    return _status(error) == _NOT_FOUND and _code(error) != "NoSuchBucket"


def _is_refusal(error: ClientError) -> bool:
    """Whether a condition was not met: no such version any more, another writer at this moment, another version."""
    return _is_absence(error) or _status(error) in {_CONFLICT, _PRECONDITION_FAILED}


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _answer(error: ClientError) -> str:
    return f"{_code(error)}: {error.response.get('Error', {}).get('Message', '')}".rstrip(": ")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
