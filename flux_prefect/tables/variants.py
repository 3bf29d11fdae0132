"""Variants of prompts: every combination of lists of settings, as requests and as a table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio

from flux_prefect.api.models import ImageRequest

__all__ = ["combine_requests", "write_requests"]


def combine_requests(
    prompts: Sequence[str],
    seeds: Sequence[int],
    aspect_ratios: Sequence[str],
    guidance_scales: Sequence[float],
    **fields: Any,
) -> list[ImageRequest]:
    """Combine every prompt with every seed, aspect ratio and guidance; a value that is listed twice counts once.

    Args:
        prompts: the prompts; all variants of one prompt follow each other.
        seeds: the seeds; they vary fastest.
        aspect_ratios: the aspect ratios.
        guidance_scales: the values of guidance_scale. Empty: the service's default.
        fields: other fields of every request.
    """
    guidances: list[float | None] = [*guidance_scales] or [None]
    lists: list[Sequence[Any]] = [prompts, aspect_ratios, guidances, seeds]
    return [
        ImageRequest(prompt=prompt, seed=seed, aspect_ratio=aspect_ratio, guidance_scale=guidance, **fields)
        for prompt, aspect_ratio, guidance, seed in itertools.product(*(dict.fromkeys(values) for values in lists))
    ]


async def write_requests(requests: Sequence[ImageRequest], path: Path) -> None:
    """Write requests as a .jsonl table."""
    await anyio.Path(path).write_text("".join(f"{json.dumps(request.payload())}\n" for request in requests))
