"""Delays before a call is sent again, as pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

__all__ = ["backoff", "parse_retry_after"]

_SECONDS = re.compile(r"\d+(\.\d+)?", re.ASCII)
_MOST_DOUBLINGS = 63  # a larger power of 2 overflows a float, and no cap is that high


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Parse a Retry-After header, in seconds or as an HTTP date (RFC 9110, 10.2.3), into seconds.

    Never negative; 0 for a date in the past. None without a header or for an invalid one. The caller caps it: a
    server may ask for a year.

    Args:
        value: the header's value.
        now: the current time, with a time zone.
    """
    if value is None:
        return None
    text = value.strip()
    if _SECONDS.fullmatch(text):
        seconds = float(text)
        return seconds if math.isfinite(seconds) else None
    try:
        date = parsedate_to_datetime(text)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    if date.tzinfo is None:  # "-0000": the time is UTC, its sender's zone unknown
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - now).total_seconds())


def backoff(attempt: int, base: float, cap: float, random: Callable[[], float]) -> float:
    """Draw the seconds to wait after refusal number `attempt` (from 0), for a server that requested no delay.

    Full jitter: uniform between 0 and `base` doubled `attempt` times, at most `cap`, so that callers that were
    refused together do not return together.

    Args:
        attempt: refusals before this one.
        base: the longest first delay, in seconds.
        cap: the longest delay, in seconds.
        random: draws uniformly from [0, 1).
    """
    return min(cap, base * 2.0 ** min(attempt, _MOST_DOUBLINGS)) * random()
