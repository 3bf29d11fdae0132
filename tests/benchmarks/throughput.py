"""Images a second, CPU on both sides and memory, of all contestants side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from .contestants import Name
from .measuring import Measurement, RunFailed, measure, new_batch
from .stage import Stage, open_stage
from .tables import Table, compare

IMAGES = 300
ROUNDS = 1
_CONTESTANTS: tuple[Name, ...] = ("lean", "plain", "empty", "steps", "chunks")


def run(console: Console, *, images: int = IMAGES, rounds: int = ROUNDS) -> None:
    """Publish `images` images of 300 KB that take a second each, with every contestant in turn, and print a table."""
    runs: dict[Name, list[Measurement]] = {name: [] for name in _CONTESTANTS}
    with open_stage(latency=1.0, image_bytes=300_000) as stage:
        for number in range(rounds):
            for name in _CONTESTANTS if number % 2 == 0 else reversed(_CONTESTANTS):
                runs[name].append(_run_once(stage, name, images))
                console.print(f"[dim]round {number + 1}: {name} {runs[name][-1].seconds:.1f} s")
    best = {name: _Best(measured) for name, measured in runs.items()}
    lean, plain, empty, steps, chunks = (best[name] for name in _CONTESTANTS)
    table = Table(
        f"{images} images of 1 s, 50 at once; CPU an image; best of {rounds}",
        "images/s",
        "of lean",
        "client ms",
        "server ms",
        "peak MB",
    )
    for name, one in best.items():
        speed = ("", "") if name == "empty" else (f"{one.speed:.1f}", f"{one.speed / lean.speed:.2f}")
        table.add(name, *speed, f"{one.client:.1f}", f"{one.server:.1f}", f"{one.memory:.0f}")
    table.print(console)
    compare(console, "client CPU: steps / (empty + lean)", steps.client / (empty.client + lean.client), most=1.3)
    compare(console, "server CPU: chunks / steps", chunks.server / steps.server, most=0.1)
    compare(console, "images/s: chunks / lean", chunks.speed / lean.speed, least=0.95)
    compare(console, "images/s: steps / plain", steps.speed / plain.speed, least=2)


def _run_once(stage: Stage, name: Name, images: int) -> Measurement:
    with new_batch(stage, images) as batch:
        measured = measure(stage, name, batch)
    if name != "empty" and measured.paid != images:
        raise RunFailed(f"{name} paid for {measured.paid} images instead of {images}.")
    return measured


class _Best:
    """The best that a contestant showed of everything, as other work on the machine only ever makes it worse."""

    def __init__(self, runs: Sequence[Measurement]) -> None:
        self.speed = max(run.rows / run.seconds for run in runs)
        self.client = min(1000 * run.client_cpu / run.rows for run in runs)
        self.server = min(1000 * run.server_cpu / run.rows for run in runs)
        self.memory = min(run.peak_memory for run in runs) / 1e6
