"""The object that marks a batch as active, so that a table has one batch at a time and an interrupted one is resumed.

<prefix>/manifests/sharded/<digest>.json  while the batch is active: its run and its shards
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from flux_prefect.bucket.conditional_object import ConditionalObject
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.leases import BucketLeases, Lease
from flux_prefect.display.run_names import name_source
from flux_prefect.sharding.shards import Split
from flux_prefect.tables.table import Only, Table

__all__ = ["ActiveBatch", "active_batch_object", "hold_active_batch"]

_PATIENCE = 30.0


@dataclass(frozen=True)
class ActiveBatch:
    """A batch over a table, held by this run alone.

    Attributes:
        target: the object in the bucket.
        lease: the lease that this run holds.
        unfinished: the shards of an earlier run that has not completed the batch, or None.
    """

    target: ConditionalObject
    lease: Lease
    unfinished: Split | None

    async def store(self, split: Split) -> None:
        """Store the shards, so that the same call resumes the batch if this run ends early.

        Raises:
            BucketError: the object can't be written.
        """
        await self.target.write(split.model_dump_json().encode(), over=None)

    async def remove(self) -> None:
        """Remove the object: the batch is complete.

        Raises:
            BucketError: the object can't be read or removed.
        """
        if (version := await self.target.read()) is not None:
            await self.target.remove(version.etag)


@asynccontextmanager
async def hold_active_batch(
    bucket: ImageBucket, target: ConditionalObject, *, lost_after_seconds: float
) -> AsyncIterator[ActiveBatch]:
    """Hold a batch for the block. Waits while another run holds it; what that run completes meanwhile is still read.

    Args:
        bucket: the bucket.
        target: from `active_batch_object`.
        lost_after_seconds: seconds after which a holder that was killed loses the batch.

    Raises:
        BucketError: the object or the lease can't be read or written.
    """
    seen = await target.read()  # another run may end and remove it while this run waits
    async with BucketLeases(bucket, lost_after_seconds).hold(target.uri) as lease:
        version = await target.read() or seen
        yield ActiveBatch(target, lease, None if version is None else Split.model_validate_json(version.content))


def active_batch_object(
    bucket: ImageBucket, source: str | Sequence[Any], table: Table, *, only: Only | None, endpoint: str
) -> ConditionalObject:
    """The object in the bucket that marks a batch over this table as active. Reads the table once.

    It is the same object on every machine for the same rows, file name, `only`, bucket and endpoint.

    Raises:
        TableError: the table can't be read completely.
    """
    name = name_source(source) if isinstance(source, str) else ""
    server = bucket.get_client().meta.endpoint_url
    digest = hashlib.sha256(json.dumps([name, only, endpoint, bucket.bucket_name, bucket.prefix, server]).encode())
    for row in table.rows():
        request = None if row.request is None else row.request.payload()
        line = json.dumps([row.number, row.id, request, row.carried, row.error], sort_keys=True, default=str)
        digest.update(line.encode(errors="replace") + b"\n")
    return ConditionalObject(bucket, f"manifests/sharded/{digest.hexdigest()[:40]}.json", patience=_PATIENCE)
