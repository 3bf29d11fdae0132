"""What a plan found, kept on the disk."""

from __future__ import annotations

import tracemalloc
from datetime import datetime, timezone

import pytest

from flux_prefect.batch.published_index import PublishedIndex
from flux_prefect.bucket.published_image import PublishedImage


def image(index: int = 0, *, created: bool = False) -> PublishedImage:
    """An image in the bucket."""
    return PublishedImage(
        bucket="images",
        key=f"tëam/{index}.jpg",
        uri=f"s3://images/tëam/{index}.jpg",
        url=None,
        etag="e",
        sha256="0" * 64,
        size=1000,
        content_type="image/jpeg",
        width=96,
        height=64,
        fingerprint="f" * 32,
        index=index,
        seed=2**32 - 1,
        sidecar_key="s",
        published_at=datetime(2026, 3, 1, 12, 0, 0, 123, tzinfo=timezone.utc),
        created=created,
    )


@pytest.fixture
def finds() -> PublishedIndex:
    """An empty one."""
    return PublishedIndex()


def test_what_was_kept_comes_back_equal(finds: PublishedIndex) -> None:
    """All images of a request, in their order, with every field."""
    images = (image(0), image(1), image(2, created=True))
    finds.add("a", images)

    assert finds.get("a") == images
    finds.close()


def test_what_was_not_found_is_none(finds: PublishedIndex) -> None:
    """It is no error to ask."""
    finds.add("a", [image()])

    assert finds.get("b") is None
    finds.close()


def test_a_request_counts_once(finds: PublishedIndex) -> None:
    """Kept again, the last counts."""
    finds.add("a", [image(0)])
    finds.add("a", [image(1)])
    finds.add("b", [image(0)])

    assert len(finds) == 2
    assert finds.get("a") == (image(1),)
    finds.close()


def test_two_plans_share_nothing(finds: PublishedIndex) -> None:
    """Each has a database of its own."""
    other = PublishedIndex()
    finds.add("a", [image()])

    assert other.get("a") is None
    assert len(other) == 0
    other.close()
    finds.close()


def test_memory_does_not_grow_with_the_requests(finds: PublishedIndex) -> None:
    """Python keeps none of them."""
    images = [image()]
    finds.add("warm", images)
    tracemalloc.start()
    for number in range(2_000):
        finds.add(f"{number:032x}", images)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(finds) == 2_001
    assert grown < 200_000
    finds.close()
