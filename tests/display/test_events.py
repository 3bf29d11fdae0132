"""The events of a batch, as a real Prefect server stores them."""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.events.schemas.events import ReceivedEvent

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.events import BATCH_FINISHED, IMAGE_FAILED, IMAGE_PUBLISHED, find_asset
from flux_prefect.flows.publish_batch import publish_batch

MATERIALIZED = "prefect.asset.materialization.succeeded"


async def read_events(bucket: ImageBucket, *, batches: int = 1) -> list[ReceivedEvent]:
    """All events of this package about a bucket, once the last ones of all batches have arrived."""
    async with get_client() as client:
        for _ in range(200):
            chosen = EventFilter(  # a new one each time, because its time range ends when it is made
                event=EventNameFilter(prefix=["flux.", MATERIALIZED]),
                resource=EventResourceFilter(id_prefix=[bucket.uri]),
            )
            events = (await client.read_events(chosen, limit=50)).events
            if [event.event for event in events].count(MATERIALIZED) == batches:
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
        events = await read_events(bucket)

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
        events = await read_events(bucket)

        assert Counter(event.event for event in events) == {BATCH_FINISHED: 1, MATERIALIZED: 1}
        end = next(event for event in events if event.event == BATCH_FINISHED)
        assert end.resource["flux.outcome"] == "failed"

    async def test_unchanged_images_have_no_events(self, bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
        """The second run of a table publishes nothing, and emits only the events of its end."""
        rows = table(1)[:1]
        await publish_batch(rows, bucket, credentials)
        await publish_batch(rows, bucket, credentials)
        events = await read_events(bucket, batches=2)

        assert Counter(event.event for event in events) == {IMAGE_PUBLISHED: 1, BATCH_FINISHED: 2, MATERIALIZED: 2}


def test_an_address_that_is_not_an_asset_key_has_no_asset() -> None:
    """Prefect rejects spaces in the key of an asset; a paid batch must not fail for that reason."""
    assert find_asset("s3://images/a b") is None
    assert find_asset("s3://images/catalogue") is not None
