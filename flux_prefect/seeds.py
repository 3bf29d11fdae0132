"""Seeds for requests that have none."""

from __future__ import annotations

import hashlib
import json
from datetime import date

from flux_prefect.api.models import MAX_SEED, ImageRequest

__all__ = ["draw_day_seed", "draw_seed", "with_seed"]


def draw_seed(run: str, item_id: str) -> int:
    """A seed from 1 to 4,294,967,295, the same each time for one run and item_id.

    A retried run draws the seeds of its first attempt and so finds what that one paid for; another run draws others.

    Example:
        ```python
        ImageRequest(prompt="a fox", seed=draw_seed("autumn catalogue", "fox"))
        ```
    """
    digest = hashlib.sha256(json.dumps([run, item_id]).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED + 1


def draw_day_seed(day: date, item_id: str) -> int:
    """A seed from 1 to 4,294,967,295, the same in every run for one day and item_id; each day has others.

    Example:
        ```python
        from datetime import date

        ImageRequest(prompt="a fox", seed=draw_day_seed(date(2026, 11, 26), "fox"))
        ```
    """
    return draw_seed(day.isoformat(), item_id)


def with_seed(request: ImageRequest, run: str, item_id: str) -> ImageRequest:
    """The request itself where it has a seed, else with one drawn for it.

    Example:
        ```python
        request = with_seed(ImageRequest(prompt="a fox"), "autumn catalogue", "fox")
        ```
    """
    if request.seed is not None:
        return request
    return request.model_copy(update={"seed": draw_seed(run, item_id)})
