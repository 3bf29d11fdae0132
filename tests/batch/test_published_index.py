"""The index of published images on disk."""

from __future__ import annotations

import tracemalloc
from datetime import datetime, timezone

import pytest

from flux_prefect.batch.published_index import PublishedIndex
from flux_prefect.bucket.published_image import PublishedImage


def image(index: int = 0, *, created: bool = False) -> PublishedImage:
    """Make the record of an image in the bucket."""
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
def index() -> PublishedIndex:
    """An empty index."""
    return PublishedIndex()


def test_added_images_come_back_equal(index: PublishedIndex) -> None:
    """All images of a request, in their order, with every field."""
    images = (image(0), image(1), image(2, created=True))
    index.add("a", images)

    assert index.get("a") == images
    index.close()


def test_a_request_that_was_not_added_is_none(index: PublishedIndex) -> None:
    """A missing request is no error."""
    index.add("a", [image()])

    assert index.get("b") is None
    index.close()


def test_a_request_counts_once(index: PublishedIndex) -> None:
    """Adding it again replaces its images."""
    index.add("a", [image(0)])
    index.add("a", [image(1)])
    index.add("b", [image(0)])

    assert len(index) == 2
    assert index.get("a") == (image(1),)
    index.close()


def test_two_indexes_share_nothing(index: PublishedIndex) -> None:
    """Each has a database of its own."""
    other = PublishedIndex()
    index.add("a", [image()])

    assert other.get("a") is None
    assert len(other) == 0
    other.close()
    index.close()


def test_memory_does_not_grow_with_the_requests(index: PublishedIndex) -> None:
    """Images are on disk, not in Python's memory."""
    images = [image()]
    index.add("warm", images)
    tracemalloc.start()
    for number in range(2_000):
        index.add(f"{number:032x}", images)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(index) == 2_001
    assert grown < 200_000
    index.close()
