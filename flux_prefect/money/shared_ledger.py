"""The ledger of a flow run in the bucket, where an attempt on another host finds it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import anyio
from pydantic import ValidationError

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.object_operations import ObjectHeaders
from flux_prefect.concurrency import run_in_thread
from flux_prefect.errors import BucketError
from flux_prefect.money.ledger import CallRecord, encode_record

__all__ = ["SharedLedger"]

_logger = logging.getLogger(__name__)

_HEADERS = ObjectHeaders("application/x-ndjson", "no-store")
_MAX_PART = 256 * 1024
_FLUSH_SECONDS = 2.0


class SharedLedger:
    """The records of a run as `manifests/<run>/ledger/<n>.jsonl` below the bucket's prefix.

    Each part has one writer, which took its number by a conditional write and writes the part anew with every flush.
    All calls that wait for a flush share one PUT. Records of one call may be in several parts: `Fold` merges them.

    For one event loop.

    Args:
        bucket: where the images are.
        run: the flow run's id.
    """

    def __init__(self, bucket: ImageBucket, run: str) -> None:
        self._bucket = bucket
        self._folder = f"manifests/{run}/ledger"
        self._next = 1
        self._part: str | None = None
        self._content = bytearray()
        self._waiting: list[bytes] = []
        self._added = self._flushed = 0
        self._flushing = anyio.Lock()

    async def read(self) -> list[CallRecord]:
        """Read the records of all parts. One GET a part, and one more. Lines of a later version are left out.

        Raises:
            BucketError: the bucket can't say.
        """
        records: list[CallRecord] = []
        for number in itertools.count(self._next):
            found = await run_in_thread(self._bucket.objects.read, self._key(number))
            if found is None:
                self._next = number
                return records
            records += _parse(found.content)
        raise AssertionError

    def add(self, record: CallRecord) -> None:
        """Add a record. It is in the bucket after the next `flush`."""
        self._waiting.append(encode_record(record))
        self._added += 1

    async def flush(self) -> None:
        """Write all records that were added before. One PUT for all callers that wait at the same time.

        Raises:
            BucketError: the bucket did not take them. The next flush tries again.
        """
        wanted = self._added
        async with self._flushing:
            if self._flushed < wanted:
                await self._write()

    @asynccontextmanager
    async def flushing(self) -> AsyncIterator[None]:
        """Flush every 2 seconds inside the block, and at its end. A failure is logged: the spool has the records."""
        background = asyncio.create_task(self._flush_at_times())
        try:
            yield
        finally:
            background.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([background])
                await self._try_flush()

    async def _flush_at_times(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            with anyio.CancelScope(shield=True):
                await self._try_flush()

    async def _try_flush(self) -> None:
        try:
            await self.flush()
        except BucketError as error:
            _logger.warning("The ledger in s3://%s is behind: %s", self._bucket.bucket_name, error)

    async def _write(self) -> None:
        added, self._waiting = self._waiting, []
        try:
            self._content += b"".join(added)
            await self._put(bytes(self._content))
        except BaseException:
            del self._content[len(self._content) - sum(map(len, added)) :]
            self._waiting[:0] = added
            raise
        self._flushed += len(added)
        if len(self._content) > _MAX_PART:
            self._part, self._content = None, bytearray()

    async def _put(self, content: bytes) -> None:
        objects = self._bucket.objects
        while self._part is None:
            key = self._key(self._next)
            created = await run_in_thread(objects.put_new, key, content, _HEADERS)
            self._next += 1  # readers stop at the first number that is not there
            if created is not None:
                self._part = key
                return
        await run_in_thread(objects.put, self._part, content, _HEADERS)

    def _key(self, number: int) -> str:
        return f"{self._bucket.prefix}/{self._folder}/{number}.jsonl".lstrip("/")


def _parse(content: bytes) -> Iterator[CallRecord]:
    for line in content.splitlines():
        with suppress(ValidationError):
            yield CallRecord.model_validate_json(line)
