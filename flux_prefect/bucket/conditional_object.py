"""One small object in a bucket that is only ever written and removed under a condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
from botocore.exceptions import ClientError

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import BucketUnavailable, ConditionsIgnored

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

__all__ = ["ConditionalObject", "Version"]

_Result = TypeVar("_Result")

_NOT_FOUND, _NOT_IMPLEMENTED = 404, 501
_REFUSED = {_NOT_FOUND, 409, 412}  # gone meanwhile, somebody else writes at this moment, another version
_NOBODYS_ETAG = '"00000000000000000000000000000000"'


@dataclass(frozen=True)
class Version:
    """What stood there at one moment.

    Attributes:
        etag: names this version and no other, as long as no two writes have the same content.
        content: the bytes.
    """

    etag: str
    content: bytes


class ConditionalObject:
    """An object that many machines write, of whom one wins each time: the bucket decides.

    Every method is one request (boto3 may repeat it: then an answer that was lost looks like a refusal, and `read`
    tells who wrote). It waits for no other request of this process, and is given up after `patience` seconds; one that
    was given up may still be carried out.

    Raises:
        BucketUnavailable: from every method, where there was no answer in time.
        BucketError: from every method, with what to correct.
    """

    def __init__(self, bucket: ImageBucket, path: str, *, patience: float) -> None:
        self._bucket = bucket
        self._patience = patience
        self._key = f"{bucket.prefix}/{path}".lstrip("/")
        # Of its own: the threads that all others share may be busy with uploads for longer than a lease lasts.
        self._threads = anyio.CapacityLimiter(2)

    @property
    def uri(self) -> str:
        """`s3://bucket/key`."""
        return f"s3://{self._bucket.bucket_name}/{self._key}"

    async def read(self) -> Version | None:
        """What stands there now; None where nothing does."""

        def get(client: S3Client) -> Version | None:
            try:
                found = client.get_object(Bucket=self._bucket.bucket_name, Key=self._key)
            except client.exceptions.NoSuchKey:
                return None
            return Version(found["ETag"], found["Body"].read())

        return await self._run(get)

    async def write(self, content: bytes, *, over: str | None) -> str | None:
        """Put content over the version with the ETag `over`; None: where there is nothing.

        Returns:
            The new ETag, or None where something else stands there, or somebody else writes at this moment.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over}

        def put(client: S3Client) -> str | None:
            try:
                return client.put_object(
                    Bucket=self._bucket.bucket_name,
                    Key=self._key,
                    Body=content,
                    ContentType="application/json",
                    CacheControl="no-store",
                    **condition,
                    **self._bucket.encryption,
                )["ETag"]
            except ClientError as error:
                if _status(error) == _NOT_IMPLEMENTED:
                    raise self._ignored() from error
                if _is_refusal(error):
                    return None
                raise

        return await self._run(put)

    async def remove(self, etag: str) -> None:
        """Remove the version with this ETag, and leave any other.

        A server may take no conditions for removals, or overlook them, and then removes what is there: to be called
        only by whoever knows that it is theirs.
        """

        def delete(client: S3Client) -> None:
            try:
                client.delete_object(Bucket=self._bucket.bucket_name, Key=self._key, IfMatch=etag)
            except ClientError as error:
                if _status(error) == _NOT_IMPLEMENTED:
                    client.delete_object(Bucket=self._bucket.bucket_name, Key=self._key)
                elif not _is_refusal(error):
                    raise

        await self._run(delete)

    async def prove_conditions(self, content: bytes) -> None:
        """Prove, on an object that stands there, that the server refuses what must be refused. Two requests.

        Args:
            content: what would stand there if it does not.

        Raises:
            ConditionsIgnored: it does not.
        """
        for over in (None, _NOBODYS_ETAG):
            if await self.write(content, over=over) is not None:
                raise self._ignored()

    def _ignored(self) -> ConditionsIgnored:
        return ConditionsIgnored(
            f"{self._bucket.get_client().meta.endpoint_url} does not keep to conditional writes (If-None-Match, "
            f"If-Match) in the bucket {self._bucket.bucket_name!r}, and leases need them: leave lease_seconds of the "
            "ImageBucket block empty and publish from one machine, or use an S3 server that has them."
        )

    async def _run(self, work: Callable[[S3Client], _Result]) -> _Result:
        try:
            with anyio.fail_after(self._patience):
                return await anyio.to_thread.run_sync(
                    self._bucket.perform, work, self._key, abandon_on_cancel=True, limiter=self._threads
                )
        except TimeoutError as error:
            raise BucketUnavailable(f"{self.uri}: no answer within {self._patience:g} s.") from error


def _is_refusal(error: ClientError) -> bool:
    return _status(error) in _REFUSED and error.response.get("Error", {}).get("Code") != "NoSuchBucket"


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
