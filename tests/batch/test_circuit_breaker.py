"""A batch stops paying where row after row fails for a shared reason."""

from __future__ import annotations

import pytest

from flux_prefect.batch.circuit_breaker import CircuitBreaker
from flux_prefect.errors import (
    AuthenticationFailed,
    Billed,
    ContentFlagged,
    DownloadInterrupted,
    DownloadRefused,
    EmptyGeneration,
    FluxError,
    InvalidResponse,
    NotAnImage,
    RequestRefused,
)


def _breaker(*errors: FluxError | None) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for error in errors:
        breaker.record(error)
    return breaker


@pytest.mark.parametrize("error", [InvalidResponse("odd"), EmptyGeneration("empty", billed=Billed.YES)])
def test_two_unreadable_answers_in_a_row_stop_it(error: FluxError) -> None:
    """One may be an accident; the second is the service's new form of answers."""
    assert _breaker(error).reason is None
    assert _breaker(error, error).reason is error


@pytest.mark.parametrize("error", [DownloadRefused("403"), DownloadInterrupted("down"), NotAnImage("a login page")])
def test_four_images_in_a_row_that_cannot_be_fetched_stop_it(error: FluxError) -> None:
    """What a proxy or a dead host causes for every row."""
    assert _breaker(error, error, error).reason is None
    assert _breaker(error, error, error, error).reason is error


def test_a_published_image_begins_the_count_anew() -> None:
    """The way is open."""
    error = DownloadRefused("403")
    assert _breaker(error, error, error, None, error, error, error).reason is None


def test_failures_of_single_rows_do_not_count() -> None:
    """Nor do they begin the count anew."""
    refused, flagged = RequestRefused("no", status=400), ContentFlagged("flagged")
    unbilled = InvalidResponse("odd", billed=Billed.NO)
    assert _breaker(*[refused, flagged, unbilled] * 10).reason is None
    odd = InvalidResponse("odd")
    assert _breaker(odd, refused, odd).reason is odd


def test_a_fatal_error_stops_it_at_once() -> None:
    """The first reason stays."""
    error = AuthenticationFailed("wrong key", status=401)
    assert _breaker(error, DownloadRefused("403")).reason is error
