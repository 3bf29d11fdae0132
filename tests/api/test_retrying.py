from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_prefect.api.retrying import backoff, parse_retry_after

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0.5", 0.5),
        ("31536000", 31_536_000.0),
        ("-3", None),
        ("1e3", None),
        ("nan", None),
        ("inf", None),
        ("9" * 400, None),
        ("٣", None),
        ("soon", None),
        ("Sun, 01 Mar 2026 12:00:20 GMT", 20.0),
        ("Sun, 01 Mar 2026 13:00:20 +0100", 20.0),
        ("Sun, 01 Mar 2026 12:00:20 -0000", 20.0),
        ("Sunday, 01-Mar-26 12:00:20 GMT", 20.0),
        ("Sun, 01 Mar 2026 11:59:00 GMT", 0.0),
        ("Sun, 31 Feb 2026 12:00:00 GMT", None),
        ("Sun, 01 Mar 99999 12:00:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms(value: str | None, seconds: float | None) -> None:
    """Seconds or a date, never negative; what says nothing is None."""
    assert parse_retry_after(value, NOON) == seconds


def test_a_date_is_reckoned_from_the_present_in_any_zone() -> None:
    """The clock's own time zone changes nothing."""
    here = NOON.astimezone(timezone(timedelta(hours=-8)))
    assert parse_retry_after("Sun, 01 Mar 2026 12:00:20 GMT", here) == 20


@given(st.text())
def test_no_header_breaks_the_reading(value: str) -> None:
    """Whatever a server sends comes out as None or as seconds."""
    seconds = parse_retry_after(value, NOON)
    assert seconds is None or seconds >= 0


@pytest.mark.parametrize(("attempt", "longest"), [(0, 2.0), (1, 4.0), (4, 32.0), (5, 60.0), (63, 60.0), (10_000, 60.0)])
def test_backoff_doubles_up_to_its_cap(attempt: int, longest: float) -> None:
    """The longest wait doubles with each refusal and stops at the cap, however many there were."""
    assert backoff(attempt, 2, 60, lambda: 1.0) == longest


@pytest.mark.parametrize("drawn", [0.0, 0.25, 0.999])
def test_backoff_spreads_over_the_whole_range(drawn: float) -> None:
    """Full jitter: the draw decides between nothing and the longest wait."""
    assert backoff(2, 1, 60, lambda: drawn) == 4 * drawn
