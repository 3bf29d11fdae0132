"""Seeds for requests without one."""

from __future__ import annotations

import hashlib
import json
from datetime import date

from flux_prefect.api.models import MAX_SEED, ImageRequest

__all__ = ["draw_day_seed", "draw_seed", "with_seed"]


def draw_seed(run: str, item_id: str) -> int:
    """Draw a seed from 1 to 4,294,967,295: always the same for the same run and item, usually another for any other.

    A retried run draws the seeds of its first attempt, and so finds the images that the first attempt paid for.

    Example:
        ```python
        ImageRequest(prompt="a fox", seed=draw_seed("autumn catalogue", "fox"))
        ```
    """
    digest = hashlib.sha256(json.dumps([run, item_id]).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED + 1


def draw_day_seed(day: date, item_id: str) -> int:
    """Draw a seed from 1 to 4,294,967,295: the same in every run for one day and item, usually another on another day.

    Example:
        ```python
        from datetime import date

        ImageRequest(prompt="a fox", seed=draw_day_seed(date(2026, 11, 26), "fox"))
        ```
    """
    return draw_seed(day.isoformat(), item_id)


def with_seed(request: ImageRequest, run: str, item_id: str) -> ImageRequest:
    """Return the request with a seed: its own, or one drawn by `draw_seed`.

    Example:
        ```python
        request = with_seed(ImageRequest(prompt="a fox"), "autumn catalogue", "fox")
        ```
    """
    if request.seed is not None:
        return request
    return request.model_copy(update={"seed": draw_seed(run, item_id)})
