"""Whether `flux-prefect forecast` is right: batches forecast, then measured.

The forecasts' data on this machine are measured in two separate small runs: one image (the time of a run beside its
images) and images at no latency (the CPU time of each).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from rich.console import Console

from flux_prefect.forecast.latency import MeasuredLatency
from flux_prefect.forecast.scenario import Scenario
from flux_prefect.forecast.simulation import forecast

from .measuring import IN_FLIGHT, Measurement, measure, new_batch
from .stage import Stage, open_stage
from .tables import Table, compare

ROUNDS = 1
_CALIBRATION_IMAGES = 150
_THROWS = 15  # forecasts of one batch, with other draws; their median counts
_RANKS = 1_000


@dataclass(frozen=True)
class _Case:
    """A batch at a sandbox.

    Attributes:
        latency, jitter: of the sandbox: seconds, and at most so many more, evenly spread.
        failed: rows whose first call ends with 500, at once.
        service_in_flight: calls that the sandbox takes at once.
    """

    name: str
    images: int
    in_flight: int
    latency: float
    jitter: float = 0.0
    failed: int = 0
    service_in_flight: int | None = None

    def forecast(self, machine: _Machine) -> float:
        """How long it will take."""
        ranks = ((number + 0.5) / _RANKS for number in range(_RANKS))
        scenario = Scenario(
            images=self.images,
            max_in_flight=self.in_flight,
            latency=MeasuredLatency(seconds=tuple(self.latency + self.jitter * rank for rank in ranks)),
            failed=self.failed / (self.images + self.failed),
            failed_after=0,
            service_in_flight=self.service_in_flight,
            start_seconds=machine.run_seconds,
            cpu_seconds=machine.image_seconds,
        )
        return median(forecast(scenario.model_copy(update={"random_seed": seed})).seconds for seed in range(_THROWS))

    def measure(self, stage: Stage) -> Measurement:
        """How long it takes."""
        stage.sandbox.control.settings(
            latency=self.latency, latency_jitter=self.jitter, max_in_flight=self.service_in_flight
        )
        with new_batch(stage, self.images) as batch:
            for index in range(self.failed):
                row = 1 + index * self.images // self.failed
                stage.sandbox.control.inject("server_error", prompt_contains=f"{batch.name}, {row}.")
            return measure(stage, "chunks", batch, in_flight=self.in_flight)


@dataclass(frozen=True)
class _Machine:
    """Data on the measuring machine for the forecasts.

    Attributes:
        run_seconds: of a run beside its images.
        image_seconds: CPU time of an image.
    """

    run_seconds: float
    image_seconds: float


_EMPTY = _Case("one image", images=1, in_flight=IN_FLIGHT, latency=0)
_BUSY = _Case("no latency", images=_CALIBRATION_IMAGES, in_flight=IN_FLIGHT, latency=0)
_CASES = (
    _Case("300 of 1 s, 50 at once", images=300, in_flight=50, latency=1),
    _Case(
        "200 of 0.5 to 2.5 s, 16 at once of which 12 are taken, 5 % 500",
        images=200,
        in_flight=16,
        latency=0.5,
        jitter=2,
        failed=10,
        service_in_flight=12,
    ),
    _Case("120 of 3 s, 20 at once", images=120, in_flight=20, latency=3),
)


def run(console: Console, *, rounds: int = ROUNDS) -> None:
    """Calibrate, forecast and measure, and print both. With rounds, the best of each counts."""
    taken: dict[_Case, list[Measurement]] = {case: [] for case in (_EMPTY, _BUSY, *_CASES)}
    with open_stage(latency=0, image_bytes=300_000) as stage:
        for number in range(rounds):
            for case, so_far in taken.items():
                so_far.append(case.measure(stage))
                console.print(f"[dim]round {number + 1}: {case.name} {so_far[-1].seconds:.1f} s")
    seconds = {case: min(one.seconds for one in so_far) for case, so_far in taken.items()}
    empty, busy = (min(one.client_cpu for one in taken[case]) for case in (_EMPTY, _BUSY))
    machine = _Machine(
        run_seconds=seconds[_EMPTY], image_seconds=max(0.0, busy - empty) / (_BUSY.images - _EMPTY.images)
    )
    table = Table(
        f"A run takes {machine.run_seconds:.1f} s beside its images, an image "
        f"{1000 * machine.image_seconds:.0f} ms of CPU time; best of {rounds}",
        "forecast s",
        "measured s",
        "ratio",
    )
    ratios = {}
    for case in _CASES:
        predicted, measured = case.forecast(machine), seconds[case]
        ratios[case] = predicted / measured
        table.add(case.name, f"{predicted:.1f}", f"{measured:.1f}", f"{ratios[case]:.2f}")
    table.print(console)
    for case, ratio in ratios.items():
        compare(console, f"{case.name}: forecast / measured", ratio, least=0.85, most=1.15)
