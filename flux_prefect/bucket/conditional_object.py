"""A small object in a bucket that is written and removed under conditions only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread
from typing_extensions import TypeVarTuple, Unpack

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.object_operations import ObjectHeaders, Version
from flux_prefect.errors import BucketUnavailable

__all__ = ["ConditionalObject"]

_Result = TypeVar("_Result")
_Args = TypeVarTuple("_Args")

_UNUSED_ETAG = '"00000000000000000000000000000000"'


class ConditionalObject:
    """An object that many machines write, of which one wins each time: the bucket decides.

    Every method is one request (boto3 may repeat it: then a lost answer looks like a refusal, and `read` shows whose
    version is there). It waits for no other request of this process, and is abandoned after `patience` seconds; the
    server may still execute an abandoned request.

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
        """The object as it is now; None where there is none."""
        return await self._run(self._bucket.objects.read, self._key)

    async def write(self, content: bytes, *, over: str | None) -> str | None:
        """Write content over the version with the ETag `over`; None: where there is no object.

        Returns:
            The new ETag, or None where another version is there or another writer is at work.
        """
        headers = ObjectHeaders("application/json", "no-store")
        return await self._run(partial(self._bucket.objects.put_over, self._key, content, headers, etag=over))

    async def remove(self, etag: str) -> None:
        """Remove the version with this ETag, and leave any other.

        A server may ignore or refuse conditions on deletion, and then the object is deleted whatever its version:
        only for a caller that knows the version to be its own.
        """
        await self._run(self._bucket.objects.delete_version, self._key, etag)

    async def prove_conditions(self, content: bytes) -> None:
        """Prove, on an object that exists, that the server refuses writes whose condition is not met. Two requests.

        Args:
            content: written where the server does not refuse.

        Raises:
            ConditionsIgnored: the server does not refuse.
        """
        for over in (None, _UNUSED_ETAG):
            if await self.write(content, over=over) is not None:
                raise self._bucket.objects.conditions_ignored()

    async def _run(self, work: Callable[[Unpack[_Args]], _Result], *args: Unpack[_Args]) -> _Result:
        try:
            with anyio.fail_after(self._patience):
                return await anyio.to_thread.run_sync(work, *args, abandon_on_cancel=True, limiter=self._threads)
        except TimeoutError as error:
            raise BucketUnavailable(f"{self.uri}: no answer within {self._patience:g} s.") from error
