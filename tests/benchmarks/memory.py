"""Whether the memory of a batch grows with its length."""

from __future__ import annotations

from rich.console import Console

from .measuring import measure, new_batch
from .stage import open_stage
from .tables import Table, compare

IMAGES = 10_000


def run(console: Console, *, images: int = IMAGES) -> None:
    """Publish small images, in chunks, in batches of a twentieth, a fifth and all of `images`, and print a table."""
    sizes = (images // 20, images // 5, images)
    peaks: list[float] = []
    table = Table("20 KB images, 0.05 s each at the service, 50 at once", "peak MB", "more MB", "images/s")
    with open_stage(latency=0.05, image_bytes=20_000) as stage:
        for size in sizes:
            with new_batch(stage, size) as batch:
                measured = measure(stage, "chunks", batch)
            console.print(f"[dim]{size:,} images: {measured.seconds:.1f} s")
            peaks.append(measured.peak_memory / 1e6)
            table.add(
                f"{size:,} images", f"{peaks[-1]:.0f}", f"{peaks[-1] - peaks[0]:+.0f}", f"{size / measured.seconds:.1f}"
            )
    table.print(console)
    compare(console, f"MB more for {images:,} images than for {sizes[0]:,}", peaks[-1] - peaks[0], most=40)
