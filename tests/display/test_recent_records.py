"""What a person looks at first of a batch."""

from __future__ import annotations

from support.images import fake_published_image

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.recent_records import RecentRecords
from flux_prefect.manifest.records import ItemRecord, ItemStatus

BUCKET = ImageBucket(bucket_name="images")


def _record(row: int, status: ItemStatus, hour: int = 0) -> ItemRecord:
    request = ImageRequest(prompt="a fox", seed=row)
    images = (
        (fake_published_image(BUCKET, request, hour=hour, created=status == "published"),) if status != "failed" else ()
    )
    return ItemRecord(row=row, id=str(row), status=status, request=request, images=images)


def _order(newest: RecentRecords) -> list[int]:
    return [record.row for record in newest.records()]


def test_the_last_end_comes_first() -> None:
    """Failures in their place among the images."""
    newest = RecentRecords(3)
    statuses: list[ItemStatus] = ["published", "published", "failed", "published"]
    for row, status in enumerate(statuses, start=1):
        newest.add(_record(row, status))
    assert _order(newest) == [4, 3, 2]


def test_what_was_there_already_comes_after_what_this_run_did() -> None:
    """By when it was published, the newest first, in whatever order it was met."""
    newest = RecentRecords(4)
    newest.add(_record(1, "published"))
    for row, hour in ((2, 5), (3, 9), (4, 1), (5, 7)):
        newest.add(_record(row, "unchanged", hour))
    assert _order(newest) == [1, 3, 5, 2]


def test_what_a_cap_left_out_pushes_nothing_out() -> None:
    """It has nothing to show, and comes last."""
    newest = RecentRecords(3)
    newest.add(_record(1, "published"))
    for row in (2, 3, 4):
        newest.add(_record(row, "skipped_budget"))
    assert _order(newest) == [1, 4, 3]
