"""How long to wait before a call is sent again, as pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

__all__ = ["backoff", "parse_retry_after"]

_SECONDS = re.compile(r"\d+(\.\d+)?", re.ASCII)
_MOST_DOUBLINGS = 63  # 2 to the power of more overflows a float, and no cap is that far away


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """The seconds that a Retry-After header asks for, by its two forms: seconds, or an HTTP date.

    Never negative, and 0 for a date that is past. None for no header and for one that says nothing
    (RFC 9110, 10.2.3). The caller caps it: a server may ask for a year.

    Args:
        value: the header as it came.
        now: the present, with a time zone.
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
    """Seconds to wait after the refusal number `attempt` (from 0) where the other side named none.

    Full jitter: evenly from 0 to `base` doubled `attempt` times, at most `cap`, so that callers refused
    together do not come back together.

    Args:
        attempt: refusals before this one.
        base: the longest first wait, seconds.
        cap: the longest wait of all, seconds.
        random: draws evenly from [0, 1).
    """
    return min(cap, base * 2.0 ** min(attempt, _MOST_DOUBLINGS)) * random()
