"""Where one contestant's own time goes."""

from __future__ import annotations

import pstats

from rich.console import Console

from .contestants import Name
from .measuring import measure, new_batch
from .stage import open_stage

IMAGES = 300
_LINES = 30


def run(console: Console, contestant: Name, *, images: int = IMAGES) -> None:
    """Profile a contestant on the throughput's work and print the top of it, by cumulative and by own time.

    The profile sees the event loop's thread alone, and makes everything in it slower.
    """
    with open_stage(latency=1.0, image_bytes=300_000) as stage, new_batch(stage, images) as batch:
        profile = batch.home / "profile"
        measured = measure(stage, contestant, batch, profile=profile)
        console.print(f"{contestant}: {images} images in {measured.seconds:.1f} s while being profiled")
        stats = pstats.Stats(str(profile), stream=console.file)
        for order in (pstats.SortKey.CUMULATIVE, pstats.SortKey.TIME):
            stats.sort_stats(order).print_stats(_LINES)
