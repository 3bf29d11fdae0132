"""The events of a batch, as a real Prefect server stores them."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.events.schemas.events import ReceivedEvent

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.events import BATCH_FINISHED, IMAGE_FAILED, IMAGE_PUBLISHED, find_asset
from flux_prefect.errors import BalanceTooLow, TableError
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.flows.publish_daily import publish_daily
from flux_prefect.flows.publish_sharded import publish_sharded
from flux_prefect.sandbox.launching import RunningSandbox

MATERIALIZED = "prefect.asset.materialization.succeeded"


async def read_ends(place: str, *, expected: int) -> list[ReceivedEvent]:
    """The events of the ends of batches into a bucket, oldest first: more than expected would be there as well."""
    emit_event("flux.test.last", resource={"prefect.resource.id": f"{place}/last"})
    ends = [event for event in await read_events(place, last="flux.test.last") if event.event == BATCH_FINISHED]
    assert len(ends) == expected
    return sorted(ends, key=lambda event: event.occurred)


async def read_events(place: str, *, batches: int = 1, last: str = MATERIALIZED) -> list[ReceivedEvent]:
    """All events of this package about a bucket, once the last ones of all batches have arrived."""
    async with get_client() as client:
        for _ in range(200):
            chosen = EventFilter(  # a new one each time, because its time range ends when it is made
                event=EventNameFilter(prefix=["flux.", MATERIALIZED]),
                resource=EventResourceFilter(id_prefix=[place]),
            )
            events = (await client.read_events(chosen, limit=50)).events
            if [event.event for event in events].count(last) == batches:
                return events
            await asyncio.sleep(0.1)
    raise AssertionError("the batch emitted no event of its end")


def table(rows: int) -> list[dict[str, object]]:
    """Valid rows that no other test uses, and an invalid one."""
    valid = [{"id": f"row-{n}", "prompt": f"an event {uuid4().hex}", "seed": n} for n in range(1, rows + 1)]
    return [*valid, {"id": "bad", "prompt": ""}]


@pytest.mark.usefixtures("prefect_server")
class TestEvents:
    """Of batches in a real Prefect run."""

    async def test_a_batch_in_steps_emits_events_of_each_image_and_of_its_end(
        self, bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """With the run's sums, its manifest, and for each row its image or its error."""
        report = await publish_batch(table(2), bucket, credentials, max_failed=1, density="steps")
        events = await read_events(bucket.uri)

        assert Counter(event.event for event in events) == {
            IMAGE_PUBLISHED: 2,
            IMAGE_FAILED: 1,
            BATCH_FINISHED: 1,
            MATERIALIZED: 1,
        }
        by_name = {event.event: event for event in events}
        end = by_name[BATCH_FINISHED]
        assert report.manifest is not None
        assert end.resource.id == report.manifest.removesuffix("/manifest.jsonl")
        assert end.resource["flux.outcome"] == "completed"
        assert end.payload["counts"] == {"published": 2, "invalid": 1}
        assert end.payload["credits_used"] == report.credits_used > 0
        assert end.payload["manifest"] == report.manifest
        assert end.payload["bucket"] == bucket.uri
        assert {related.role for related in end.related} >= {"flow-run", "flow"}
        images = {image.uri for item in report.items for image in item.images}
        assert {event.resource.id for event in events if event.event == IMAGE_PUBLISHED} == images
        failed = by_name[IMAGE_FAILED]
        assert failed.resource.id == f"{end.resource.id}/rows/3"
        assert (failed.payload["id"], failed.payload["status"]) == ("bad", "invalid")
        asset = by_name[MATERIALIZED]
        assert asset.resource.id == bucket.uri
        assert asset.payload["counts"] == end.payload["counts"]
        assert asset.payload["manifest"] == report.manifest

    async def test_a_batch_in_chunks_emits_only_the_events_of_its_end(
        self, bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """Two events for thousands of rows; a failed run has a label that automations can match."""
        await publish_batch(table(2), bucket, credentials, density="chunks", return_state=True)
        events = await read_events(bucket.uri)

        assert Counter(event.event for event in events) == {BATCH_FINISHED: 1, MATERIALIZED: 1}
        end = next(event for event in events if event.event == BATCH_FINISHED)
        assert end.resource["flux.outcome"] == "failed"

    async def test_unchanged_images_have_no_events(self, bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
        """The second run of a table publishes nothing, and emits only the events of its end."""
        rows = table(1)[:1]
        await publish_batch(rows, bucket, credentials)
        await publish_batch(rows, bucket, credentials)
        events = await read_events(bucket.uri, batches=2)

        assert Counter(event.event for event in events) == {IMAGE_PUBLISHED: 1, BATCH_FINISHED: 2, MATERIALIZED: 2}


@pytest.mark.usefixtures("prefect_server")
class TestEveryEnd:
    """One event an end, whatever the end: on the nights on which someone should be called as well."""

    async def test_a_balance_that_is_too_low(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """The event says why nothing was published, and that nothing was spent."""
        sandbox.control.settings(balance=1000)
        with pytest.raises(BalanceTooLow):
            await publish_batch(table(1)[:1], bucket, credentials)
        (end,) = await read_ends(bucket.uri, expected=1)

        assert (end.resource["flux.outcome"], end.resource["flux.final"]) == ("failed", "yes")
        assert "flux.manifest" not in end.resource
        assert (end.payload["status"], end.payload["reason"]) == ("failed", "BalanceTooLow")
        assert end.payload["summary"] == end.payload["message"]
        assert "top it up" in end.payload["message"]
        assert (end.payload["credits_used"], end.payload["attempt"], end.payload["manifest"]) == (0, 1, None)
        assert end.payload["bucket"] == bucket.uri

    @pytest.mark.usefixtures("sandbox")
    @pytest.mark.parametrize("publish", [publish_batch, publish_daily, publish_sharded])
    async def test_a_table_that_cannot_be_read(self, bucket: ImageBucket, publish: Any) -> None:
        """Where the source is gone, or the deployment of shards; a dry run stays silent."""
        for options in ({}, {"dry_run": True}):
            with pytest.raises((TableError, ValueError)):
                await publish("s3://nowhere/table.csv", bucket.uri, **options)
        (end,) = await read_ends(bucket.uri, expected=1)
        assert end.payload["reason"] in {"TableError", "ValueError"}

    async def test_a_bucket_that_cannot_be_resolved(self, bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
        """The event is about what was given."""
        with pytest.raises(ValueError, match="s3://name/prefix"):
            await publish_batch(table(1), f"https://{bucket.prefix}", credentials)
        (end,) = await read_ends(f"https://{bucket.prefix}", expected=1)
        assert end.payload["reason"] == "ValueError"

    async def test_a_retried_run_sends_one_event_an_attempt(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """Only the last one is final, so that nobody is called for a run that Prefect tries again."""
        sandbox.control.settings(balance=1000)
        with pytest.raises(BalanceTooLow):
            await publish_batch.with_options(retries=1)(table(1), bucket, credentials)
        first, second = await read_ends(bucket.uri, expected=2)
        assert [event.payload["attempt"] for event in (first, second)] == [1, 2]
        assert [event.resource["flux.final"] for event in (first, second)] == ["no", "yes"]
        assert first.resource.id == second.resource.id


def test_an_address_that_is_not_an_asset_key_has_no_asset() -> None:
    """Prefect rejects spaces in the key of an asset; a paid batch must not fail for that reason."""
    assert find_asset("s3://images/a b") is None
    assert find_asset("s3://images/catalogue") is not None
