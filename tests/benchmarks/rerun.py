"""What a batch costs that is published already."""

from __future__ import annotations

from rich.console import Console

from .contestants import Name
from .measuring import Measurement, measure, new_batch
from .stage import open_stage
from .tables import Table, compare

IMAGES = 1_000
ROUNDS = 1
_LESS_FOR_PLAIN = 5  # it takes so long that only a fifth of the batch is measured
_CONTESTANTS: tuple[Name, ...] = ("plain", "auto")


def run(console: Console, *, images: int = IMAGES, rounds: int = ROUNDS) -> None:
    """Publish `images` images, then the same again `rounds` times, and print a table of each one's best rerun."""
    best: dict[Name, Measurement] = {}
    with (
        open_stage(latency=0.05, image_bytes=300_000) as stage,
        new_batch(stage, max(1, images // _LESS_FOR_PLAIN)) as theirs,
        new_batch(stage, images) as ours,
    ):
        batches = dict(zip(_CONTESTANTS, (theirs, ours), strict=True))
        for name, batch in batches.items():
            console.print(f"[dim]{name}: first run {measure(stage, name, batch).seconds:.1f} s")
        for number in range(rounds):
            for name in _CONTESTANTS if number % 2 == 0 else reversed(_CONTESTANTS):
                again = measure(stage, name, batches[name])
                console.print(f"[dim]{name}: again {again.seconds:.1f} s")
                best[name] = min(again, best.get(name, again), key=lambda one: one.seconds)
    table = Table(
        f"Published already: CPU and HEADs an image; best of {rounds}",
        "images",
        "ms/image",
        "of plain",
        "client ms",
        "server ms",
        "paid",
        "HEADs",
        "other S3",
    )
    for name, one in best.items():
        heads = one.s3_calls.get("HeadObject", 0)
        table.add(
            name,
            str(one.rows),
            f"{_per_image(one):.1f}",
            f"{_per_image(one) / _per_image(best['plain']):.3f}",
            f"{1000 * one.client_cpu / one.rows:.1f}",
            f"{1000 * one.server_cpu / one.rows:.1f}",
            str(one.paid),
            f"{heads / one.rows:.2f}",
            str(sum(one.s3_calls.values()) - heads),
        )
    table.print(console)
    compare(console, "ms an image", _per_image(best["auto"]), most=5)
    compare(console, "paid", best["auto"].paid, most=0)


def _per_image(measured: Measurement) -> float:
    return 1000 * measured.seconds / measured.rows
