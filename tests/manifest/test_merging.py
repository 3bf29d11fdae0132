"""Merging the records of several attempts at a shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.errors import FluxError
from flux_prefect.manifest.merging import attribute_images, fold, is_pending, mark_failed, merge_attempts
from flux_prefect.manifest.records import ItemRecord, ItemStatus

SUMS = ("calls", "billed_calls", "unbilled_calls", "unpriced_calls", "credits_used", "refetched")


def image(row: int, *, created: bool, prefix: str = "") -> PublishedImage:
    """A published image of a row."""
    return PublishedImage.model_validate(
        {
            "bucket": "images",
            "key": f"{prefix}/{row}.jpg",
            "uri": f"s3://images/{prefix}/{row}.jpg",
            "url": None,
            "etag": "e",
            "sha256": "a" * 64,
            "size": 1000,
            "content_type": "image/jpeg",
            "width": 96,
            "height": 64,
            "fingerprint": f"{row:032x}",
            "index": 0,
            "seed": 7,
            "sidecar_key": f"{prefix}/{row}.jpg.json",
            "published_at": "2026-03-01T12:00:00Z",
            "created": created,
        }
    )


def record(row: int, status: ItemStatus, **more: Any) -> ItemRecord:
    """A record of a row."""
    images = (image(row, created=status == "published"),) if status in {"published", "unchanged"} else ()
    request = ImageRequest(prompt=f"row {row}", seed=7)
    return ItemRecord.model_validate(
        {"row": row, "id": f"row-{row}", "status": status, "request": request, "images": images, **more}
    )


statuses = st.sampled_from(["published", "unchanged", "flagged", "skipped_budget", "failed"])
calls = st.fixed_dictionaries(
    {
        **{name: st.integers(0, 3) for name in SUMS},
        "possibly_billed": st.lists(st.sampled_from(["a", "b", "c"]), unique=True),
        "billed_and_lost": st.lists(st.sampled_from(["d", "e"]), unique=True),
    }
)
attempts_at_a_row = st.lists(st.tuples(statuses, calls), min_size=1, max_size=5)


@given(attempts_at_a_row)
def test_costs_are_added_up_and_counted_once(attempts: Sequence[tuple[ItemStatus, dict[str, Any]]]) -> None:
    """Calls and costs are sums; an id that two attempts recorded is listed once."""
    records = [record(1, status, **costs) for status, costs in attempts]
    folded = fold(records)

    for name in SUMS:
        assert getattr(folded, name) == sum(getattr(one, name) for one in records)
    for name in ("possibly_billed", "billed_and_lost"):
        ids = getattr(folded, name)
        assert sorted(ids) == sorted({call for one in records for call in getattr(one, name)})


@given(attempts_at_a_row)
def test_published_once_is_published(attempts: Sequence[tuple[ItemStatus, dict[str, Any]]]) -> None:
    """Whatever later attempts recorded; without a published image the last status counts."""
    records = [record(1, status, **costs) for status, costs in attempts]
    recorded = [one.status for one in records]

    assert fold(records).status == ("published" if "published" in recorded else recorded[-1])
    assert bool(fold(records).images) == (fold(records).status in {"published", "unchanged"})


@given(st.lists(st.lists(st.tuples(st.integers(1, 9), statuses)), max_size=4))
def test_every_row_of_the_table_has_one_record(attempts: Sequence[Sequence[tuple[int, ItemStatus]]]) -> None:
    """In the table's order, whichever rows the attempts reached."""
    table = [record(row, "skipped_budget") for row in range(1, 10)]
    merged = merge_attempts(table, [[record(row, status) for row, status in attempt] for attempt in attempts])

    assert list(merged) == list(range(1, 10))
    recorded = {row for attempt in attempts for row, _ in attempt}
    assert all(merged[row] is not None and (row in recorded or is_pending(merged[row])) for row in merged)


def test_rows_that_were_not_tried_are_pending() -> None:
    """Because of a cap or the end of the run; a row with a failure of its own is not pending."""
    assert is_pending(record(1, "skipped_budget"))
    assert is_pending(record(1, "failed", error="RunStopped"))
    assert not is_pending(record(1, "failed", error="OutOfCredits"))
    assert not is_pending(record(1, "flagged"))


def test_a_row_that_is_given_up_keeps_its_costs() -> None:
    """Its record is failed, with the calls and credits of all attempts."""
    failed = mark_failed(record(1, "skipped_budget", calls=2, billed_calls=1, credits_used=5), FluxError("given up"))
    assert (failed.status, failed.message, failed.credits_used) == ("failed", "given up", 5)
    assert (failed.calls, failed.billed_calls) == (2, 1)


async def test_images_of_a_killed_run_count_for_its_batch(bucket: ImageBucket) -> None:
    """It did not record them; their sidecars name the run. Images of other batches stay unchanged."""
    found = [
        record(row, "unchanged", images=(image(row, created=False, prefix=bucket.prefix),)) for row in (1, 2, 3, 4)
    ]
    twin = found[0].model_copy(update={"row": 9, "id": "twin"})
    for row, run in ((1, "killed"), (2, "another batch's"), (3, "killed")):
        content = {"run": {"flow_run_id": run}, "credits_used": 168.0 if row == 1 else None}
        await bucket.write_path(f"{row}.jpg.json", json.dumps(content).encode())

    merged = await attribute_images([*found, twin], bucket, {"killed", "later"})

    assert {row: one.status for row, one in merged.items()} == {
        1: "published",
        2: "unchanged",
        3: "published",
        4: "unchanged",
        9: "unchanged",
    }
    assert [merged[row].billed_calls for row in merged] == [1, 0, 1, 0, 0]
    assert (merged[1].credits_used, merged[3].unpriced_calls) == (168.0, 1)
    assert merged[1].images[0].created


async def test_a_recorded_image_is_not_counted_again(bucket: ImageBucket) -> None:
    """A repeated request in the same shard found the image that the first row published."""
    published = record(1, "published", credits_used=168.0)
    repeat = record(2, "unchanged", images=(image(1, created=False, prefix=bucket.prefix),))
    await bucket.write_path("1.jpg.json", json.dumps({"run": {"flow_run_id": "r"}, "credits_used": 168.0}).encode())

    merged = await attribute_images([published, repeat], bucket, {"r"})

    assert [one.status for one in merged.values()] == ["published", "unchanged"]
