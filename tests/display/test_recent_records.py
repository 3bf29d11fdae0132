"""The newest records of a batch."""

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


def test_the_row_that_ended_last_comes_first() -> None:
    """Failed rows are among the published ones."""
    newest = RecentRecords(3)
    statuses: list[ItemStatus] = ["published", "published", "failed", "published"]
    for row, status in enumerate(statuses, start=1):
        newest.add(_record(row, status))
    assert _order(newest) == [4, 3, 2]


def test_unchanged_rows_come_after_those_of_this_run() -> None:
    """By the time of their publication, newest first, in whatever order they were added."""
    newest = RecentRecords(4)
    newest.add(_record(1, "published"))
    for row, hour in ((2, 5), (3, 9), (4, 1), (5, 7)):
        newest.add(_record(row, "unchanged", hour))
    assert _order(newest) == [1, 3, 5, 2]


def test_rows_that_a_cap_left_out_displace_no_others() -> None:
    """They have nothing to show, and come last."""
    newest = RecentRecords(3)
    newest.add(_record(1, "published"))
    for row in (2, 3, 4):
        newest.add(_record(row, "skipped_budget"))
    assert _order(newest) == [1, 4, 3]
