"""A planned batch split into shards, in a real bucket."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow

from flux_prefect.api.models import ImageRequest
from flux_prefect.batch.context import BatchContext, open_context
from flux_prefect.batch.planning import make_plan
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.pipeline import produce_image
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.sharding.active_batch import active_batch_object
from flux_prefect.sharding.shards import (
    Split,
    assign_shard,
    read_rows,
    settled_path,
    shard_path,
    split_batch,
    write_attempt_table,
)
from flux_prefect.tables.table import Table, open_table

pytestmark = pytest.mark.usefixtures("prefect_server")


def make_table(number: int, **more: Any) -> list[dict[str, Any]]:
    """Make rows that no other test uses."""
    lot = uuid4().hex
    return [{"id": f"row-{n}", "prompt": f"{lot} {n}", "seed": n, **more} for n in range(1, number + 1)]


async def split(rows: list[dict[str, Any]], context: BatchContext, *, rows_a_shard: int) -> Split:
    """Plan a table and split it."""
    run = uuid4().hex
    planned = await make_plan(Table(rows), context.bucket, context.account.base_url, context.budget, run=run)
    result = await split_batch(planned, context, rows_a_shard=rows_a_shard)
    planned.found.close()
    return result


async def read_shards(result: Split, bucket: ImageBucket) -> list[list[ItemRecord]]:
    """Read the rows of every shard."""
    return [list(await read_rows(bucket, shard_path(result.run, shard.number, 0))) for shard in result.shards]


@given(fingerprint=st.text("0123456789abcdef", min_size=32, max_size=32), shards=st.integers(1, 200))
def test_a_request_has_one_shard(fingerprint: str, shards: int) -> None:
    """It depends only on the request and the number of shards."""
    assert 0 <= assign_shard(fingerprint, shards) == assign_shard(fingerprint, shards) < shards


async def test_every_row_is_in_one_shard_or_settled(bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """Repeats share a shard; numbers, seeds and other columns are the table's; the sums are right."""
    rows = make_table(40, sku="007")
    rows[3].pop("seed")
    rows += [{"id": "bad", "prompt": ""}, {**rows[7], "id": "again", "num_images": 1}, {**rows[7], "id": "once more"}]
    async with open_context(bucket, credentials, max_credits=None, max_images=None) as context:
        result = await split(rows, context, rows_a_shard=10)
        shards = await read_shards(result, bucket)
        settled = list(await read_rows(bucket, settled_path(result.run)))

    assert len(result.shards) == 4
    assert [shard.rows for shard in result.shards] == [len(shard) for shard in shards]
    assert sum(shard.images for shard in result.shards) == 42
    assert {record.row for shard in shards for record in shard} == set(range(1, 44)) - {41}
    assert [(record.row, record.status) for record in settled] == [(41, "invalid")]
    assert result.settled == 1
    (home,) = [shard for shard in shards if any(record.row == 8 for record in shard)]
    assert {8, 42, 43} <= {record.row for record in home}
    by_row = {record.row: record for shard in shards for record in shard}
    assert all(record.request is not None and record.request.seed for record in by_row.values())
    assert by_row[1].carried == {"sku": "007"}


async def test_a_shard_is_a_table(bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """A run reads it like any other table, and the rows of a later attempt too."""
    async with open_context(bucket, credentials, max_credits=None, max_images=None) as context:
        result = await split(make_table(5), context, rows_a_shard=100)
        (rows,) = await read_shards(result, bucket)
        again = await write_attempt_table(bucket, result.run, 0, 3, rows[2:])
        address = f"{bucket.uri}/{shard_path(result.run, 0, 0)}"
        async with open_table(address, bucket=bucket) as first, open_table(again, bucket=bucket) as later:
            assert [(row.number, row.request) for row in first.rows()] == [(one.row, one.request) for one in rows]
            assert [row.number for row in later.rows()] == [3, 4, 5]


async def test_images_that_this_host_has_paid_for_are_published_first(
    bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """No other machine has their record. They cost nothing, and count for the batch once."""
    rows = make_table(3)
    elsewhere = bucket.model_copy(update={"prefix": uuid4().hex})
    request = ImageRequest.model_validate({name: rows[1][name] for name in ("prompt", "seed")})

    @flow(name="pay-elsewhere-and-split")
    async def pay_and_split() -> Split:
        await produce_image(request, elsewhere, credentials)
        async with open_context(bucket, credentials, max_credits=None, max_images=None) as context:
            return await split([*rows, {**rows[1], "id": "again"}], context, rows_a_shard=100)

    result = await pay_and_split()
    settled = list(await read_rows(bucket, settled_path(result.run)))

    assert [(record.row, record.status) for record in settled] == [(2, "published"), (4, "unchanged")]
    assert [shard.rows for shard in result.shards] == [2]
    assert sandbox.control.summary().billed_calls == 1


async def test_the_same_table_has_the_same_active_batch_object(bucket: ImageBucket) -> None:
    """Name, rows, destination, endpoint and selection decide it; how the table was read does not."""
    rows = make_table(3)

    def key(rows: list[dict[str, Any]], **changes: Any) -> str:
        arguments = {"bucket": bucket, "source": "in/prompts.csv", "only": None, "endpoint": "https://a", **changes}
        return active_batch_object(
            arguments["bucket"],
            arguments["source"],
            Table(rows),
            only=arguments["only"],
            endpoint=arguments["endpoint"],
        ).uri

    assert key(rows) == key(json.loads(json.dumps(rows))) == key(rows, source="elsewhere/prompts.csv")
    others = [
        key(rows[:2]),
        key([*rows[:2], {**rows[2], "seed": 99}]),
        key([*rows[:2], {**rows[2], "note": "x"}]),
        key(rows, source="other.csv"),
        key(rows, only="failed"),
        key(rows, endpoint="https://b"),
        key(rows, bucket=bucket.model_copy(update={"prefix": "other"})),
    ]
    assert Counter([key(rows), *others]).most_common(1)[0][1] == 1
