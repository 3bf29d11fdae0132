"""Split a planned batch into shards, and store their tables in the bucket.

<prefix>/manifests/<run>/shards/<shard>.jsonl            rows of a shard, as a manifest of pending rows
<prefix>/manifests/<run>/shards/<shard>-<attempt>.jsonl  those of them that a later attempt processes
<prefix>/manifests/<run>/shards/settled.jsonl            records of rows that the plan has settled
"""

from __future__ import annotations

import asyncio
import io
import math
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import ImageRequest
from flux_prefect.batch.context import BatchContext
from flux_prefect.batch.planning import PlannedBatch
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.concurrency import for_each
from flux_prefect.custody import recover
from flux_prefect.inline import run_inline
from flux_prefect.manifest.plan import Plan
from flux_prefect.manifest.records import ItemRecord, record_invalid, record_skipped, record_unchanged
from flux_prefect.manifest.writer import record_line
from flux_prefect.money.allocation import ShardCost
from flux_prefect.money.budget import Budget, spending_from
from flux_prefect.money.ledger import Amount
from flux_prefect.pipeline import produce_image
from flux_prefect.tables.file_views import open_view
from flux_prefect.tables.manifest_lines import read_records
from flux_prefect.tables.table import Row, Table

__all__ = [
    "Shard",
    "Split",
    "assign_shard",
    "plan_shard",
    "read_rows",
    "settled_path",
    "shard_path",
    "split_batch",
    "write_attempt_table",
]

_AT_ONCE = 8
_ROWS_PER_YIELD = 100
_JSONL = "application/x-ndjson"


class Shard(BaseModel):
    """The size and cost of one shard."""

    model_config = ConfigDict(frozen=True)

    number: int = Field(description="Number of the shard, from 0.")
    rows: int = Field(description="Number of rows.")
    images: int = Field(description="Images that the rows request.")
    credits: float = Field(description="The most that the rows cost, in credits.")
    dearest: tuple[float, int] = Field(description="Credits and images of the dearest row.")
    cheapest: tuple[float, int] = Field(description="Credits and images of the cheapest row.")

    @property
    def cost(self) -> ShardCost:
        """The most that its rows can cost."""
        return ShardCost(Amount(self.credits, self.images), Amount(*self.dearest), Amount(*self.cheapest))


class Split(BaseModel):
    """A batch split into shards, whose tables are all stored in the bucket."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(default=1, description="Version of this record's format.")
    run: str = Field(description="Id of the batch: of the flow run that planned it. Seeds are drawn from it.")
    shards: tuple[Shard, ...] = Field(description="The shards, ordered by number.")
    settled: int = Field(description="Rows that need no shard.")
    plan: Plan = Field(description="The plan of the batch.")


def shard_path(run: str, shard: int, attempt: int) -> str:
    """Path of the rows for an attempt at a shard, below the prefix."""
    return f"manifests/{run}/shards/{shard}{f'-{attempt}' if attempt else ''}.jsonl"


def settled_path(run: str) -> str:
    """Path of the records of rows that need no shard, below the prefix."""
    return f"manifests/{run}/shards/settled.jsonl"


def assign_shard(fingerprint: str, shards: int) -> int:
    """Return the shard of a request. Equal requests are in the same shard, so that one run pays for them once."""
    return int(fingerprint[:8], 16) % shards


async def split_batch(planned: PlannedBatch, context: BatchContext, *, rows_a_shard: int) -> Split:
    """Write the table of every shard to the bucket, and the records of rows that need no shard.

    Images that this host has paid for already are published first, as no other machine has their record. Repeating the
    call is harmless. One PUT a shard. Memory: about 10 bytes a row.

    Args:
        planned: the table and its plan.
        context: bucket, account, spool and budget of the batch.
        rows_a_shard: the approximate number of rows of a shard; requests are spread by their fingerprints.

    Raises:
        TableError: the table has changed and can't be read completely any more.
        BucketError: the tables can't be written to the bucket.
    """
    await _publish_spooled(planned, context)
    plan = planned.plan
    shards = max(1, math.ceil((plan.requests + plan.paid) / rows_a_shard))
    sums = [_ShardTotals() for _ in range(shards)]
    settled = 0
    with tempfile.TemporaryFile() as waiting, tempfile.TemporaryFile() as done:
        for number, row in enumerate(planned.rows()):
            if number % _ROWS_PER_YIELD == 0:
                await asyncio.sleep(0)
            if row.request is None:
                done.write(record_line(record_invalid(row), planned.run))
                settled += 1
                continue
            fingerprint = row.request.fingerprint(context.account.base_url)
            if found := planned.found.get(fingerprint):
                done.write(record_line(_record_found(row, found), planned.run))
                settled += 1
                if any(image.created for image in found):  # created counts for the first row that requests it
                    planned.found.add(fingerprint, [image.model_copy(update={"created": False}) for image in found])
                continue
            sums[assign_shard(fingerprint, shards)].add(waiting.tell(), context.budget.price_of(row.request))
            waiting.write(record_line(record_skipped(row), planned.run))
        done.flush()
        waiting.flush()
        size = waiting.tell()

        async def put(item: tuple[int, _ShardTotals]) -> None:
            with tempfile.TemporaryFile() as lines, open_view(waiting, size) as written:
                for offset in item[1].offsets:
                    written.seek(offset)
                    lines.write(written.readline())
                await _put(context.bucket, shard_path(planned.run, item[0], 0), lines)

        await for_each(enumerate(sums), put, at_once=_AT_ONCE)
        await _put(context.bucket, settled_path(planned.run), done)
    cut = tuple(totals.build(number) for number, totals in enumerate(sums))
    return Split(run=planned.run, shards=cut, settled=settled, plan=plan)


async def write_attempt_table(
    bucket: ImageBucket, run: str, shard: int, attempt: int, rows: Iterable[ItemRecord]
) -> str:
    """Write the rows for a later attempt at a shard, and return their address.

    Raises:
        BucketError: the rows can't be written to the bucket.
    """
    path = shard_path(run, shard, attempt)
    await _put(bucket, path, io.BytesIO(b"".join(record_line(record, run) for record in rows)))
    return f"{bucket.uri}/{path}"


async def read_rows(bucket: ImageBucket, path: str) -> Iterator[ItemRecord]:
    """Read the records of a small manifest below the prefix, in the table's order. Empty if there is no such object.

    Raises:
        BucketError: the manifest can't be read.
        TableError: the object is not a manifest.
    """
    try:
        content = await bucket.read_path(path)
    except ValueError:
        return iter(())
    return (ItemRecord.model_validate(record) for record in read_records(io.BytesIO(content), path))


def plan_shard(table: Table, context: BatchContext) -> Plan:
    """Plan a shard from its table alone: its rows were looked up when the batch was planned.

    Raises:
        TableError: the table can't be read completely.
    """
    rows, invalid, most = 0, 0, Amount(0.0, 0)
    for row in table.rows():
        rows += 1
        if row.request is None:
            invalid += 1
        else:
            most += context.budget.price_of(row.request)
    return Plan(
        rows=rows,
        invalid=invalid,
        published=0,
        repeats=0,
        paid=0,
        requests=rows - invalid,
        images=int(most.images),
        most_credits=most.credits,
        max_credits=context.budget.max_credits,
        max_images=context.budget.max_images,
    )


class _ShardTotals:
    """Offsets of a shard's rows in the temporary file, and their costs."""

    def __init__(self) -> None:
        self.offsets = array("Q")
        self._most = Amount(0.0, 0)
        self._prices: set[tuple[float, int]] = set()

    def add(self, offset: int, price: Amount) -> None:
        self.offsets.append(offset)
        self._most += price
        self._prices.add((price.credits, int(price.images)))

    def build(self, number: int) -> Shard:
        return Shard(
            number=number,
            rows=len(self.offsets),
            images=int(self._most.images),
            credits=self._most.credits,
            dearest=(max((c for c, _ in self._prices), default=0.0), max((i for _, i in self._prices), default=0)),
            cheapest=(min((c for c, _ in self._prices), default=0.0), min((i for _, i in self._prices), default=0)),
        )


def _record_found(row: Row, images: Sequence[PublishedImage]) -> ItemRecord:
    record = record_unchanged(row, images)
    return record.model_copy(update={"status": "published"}) if any(image.created for image in images) else record


async def _publish_spooled(planned: PlannedBatch, context: BatchContext) -> None:
    """Publish images that this host has paid for and not published yet. Nothing is paid here."""
    if not planned.plan.paid:
        return
    endpoint, seen = context.account.base_url, set[str]()

    def paid_requests() -> Iterator[ImageRequest]:
        for row in planned.rows():
            if row.request is None or (fingerprint := row.request.fingerprint(endpoint)) in seen:
                continue
            if planned.found.get(fingerprint) is None and recover(row.request, endpoint, context.spool) is not None:
                seen.add(fingerprint)
                yield row.request

    async def publish(request: ImageRequest) -> None:
        production = await produce_image(request, context.bucket, context.account, run=run_inline)
        images = [outcome.image for outcome in production.images if outcome.image is not None]
        if len(images) == request.num_images:
            planned.found.add(production.fingerprint, images)

    with spending_from(Budget(default_price=0.0, max_images=0)):
        await for_each(paid_requests(), publish, at_once=_AT_ONCE)


async def _put(bucket: ImageBucket, path: str, file: BinaryIO) -> None:
    file.seek(0)
    await bucket.put_file(path, file, content_type=_JSONL, cache_control="no-cache")
