"""What a batch is going to take: wall time, credits and S3 requests, from a simulation of its events.

Modelled:

- the rows, pulled as `flux_prefect.batch.engine` does: three chunks of a hundred at once, or in steps twice as many
  rows as calls;
- the in-flight limit of each run, by the rules of the real pacer: a refusal pauses and halves it as in life; and one
  limit over all runs behind it;
- each call's latency; a service that takes so many calls at once; refusals, failures with their retries and delays,
  lost answers, flagged images;
- CPU time: a run has one core at most, and all runs may share some cores;
- shards in a queue, each with a start and an end of its own, and what comes before the first and after the last;
- the S3 requests of plans, images, leases and manifests.

Not modelled: bandwidth, a Prefect server at its limit (27 ms of its CPU a task run), a service that slows down or
limits calls a minute, S3's own failures, dead result URLs, repeated prompts, spending caps, killed workers.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Literal, TypeAlias

from flux_prefect.api.retrying import backoff
from flux_prefect.batch.engine import ROWS_PER_CHUNK
from flux_prefect.forecast.clock import Clock, Process, Slots, Wait
from flux_prefect.forecast.pacing import SimulatedPacer
from flux_prefect.forecast.scenario import Forecast, Scenario

__all__ = ["forecast"]

_End: TypeAlias = Literal["published", "flagged", "failed"]
_Outcome: TypeAlias = Literal["good", "refused", "failed", "lost", "flagged"]

_CHUNKS_AT_ONCE = 3
_ROWS_PER_CALL_IN_STEPS = 2
_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 60.0
_MAX_LISTED_KEYS, _KEYS_PER_PAGE, _KEYS_PER_IMAGE = 3000, 1000, 2
_PUTS_PER_RUN = 5  # the manifest, and what the run leaves beside it
_RENEWED_AFTER = 1 / 3  # of a lease's duration

# Approximate parts of an image's CPU time. Each part is computed without interruption.
_FINDING, _SENDING, _READING, _PUBLISHING = 0.15, 0.1, 0.1, (0.2, 0.2, 0.25)


def forecast(scenario: Scenario) -> Forecast:
    """Simulate a scenario. Equal scenarios have equal forecasts.

    Costs 0.1 ms of CPU time an image, independent of the simulated latency.
    """
    simulation = _Simulation(scenario)
    runs = [_Worker(simulation) for _ in range(scenario.workers)]
    simulation.clock.run(simulation.run_all(runs))
    return simulation.sum_up(max(run.cpu_seconds for run in runs))


class _Simulation:
    """State that all runs of a scenario share, and their sums."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.gate = Slots(self.clock, scenario.max_in_flight_in_all)
        self.cores = Slots(self.clock, scenario.cores)
        self.ends: Counter[_End] = Counter()
        self.outcomes: Counter[_Outcome] = Counter()
        self.s3: Counter[str] = Counter()
        self.at_service = 0
        self.service_seconds = 0.0

    def run_all(self, workers: list[_Worker]) -> Process:
        yield self.clock.pause(self.scenario.before_seconds)
        rows = iter(range(self.scenario.images))
        shards = (list(itertools.islice(rows, size)) for size in self.scenario.shards())
        yield self.clock.gather(worker.work(shards) for worker in workers)
        yield self.clock.pause(self.scenario.after_seconds)

    def sum_up(self, most_cpu_seconds: float) -> Forecast:
        billed = self.outcomes["good"] + self.outcomes["lost"] + self.outcomes["flagged"]
        seconds = self.clock.now
        return Forecast(
            seconds=seconds,
            published=self.ends["published"],
            flagged=self.ends["flagged"],
            failed=self.ends["failed"],
            calls=self.outcomes.total(),
            billed_calls=billed,
            refused_calls=self.outcomes["refused"],
            credits=billed * self.scenario.price,
            s3_requests=dict(sorted(self.s3.items())),
            mean_in_flight=self.service_seconds / seconds if seconds else 0.0,
            busiest_cpu=most_cpu_seconds / seconds if seconds else 0.0,
        )


class _Worker:
    """A worker that executes runs one after another, each with one core and its own in-flight limit."""

    def __init__(self, simulation: _Simulation) -> None:
        self.cpu_seconds = 0.0
        self._simulation = simulation
        self._scenario = simulation.scenario
        self._clock = simulation.clock
        self._core = Slots(self._clock, 1)
        self._pacer = SimulatedPacer(self._clock, self._scenario.max_in_flight)

    def work(self, shards: Iterator[list[int]]) -> Process:
        for shard in shards:
            # A new process starts without the learned limit. The spool may have it, which makes the run no slower.
            self._pacer = SimulatedPacer(self._clock, self._scenario.max_in_flight)
            self._count_run(len(shard))
            yield self._clock.pause(self._scenario.start_seconds)
            yield self._clock.gather(self._row_processes(iter(shard)))
            yield self._clock.pause(self._scenario.end_seconds)

    def _count_run(self, rows: int) -> None:
        s3, keys = self._simulation.s3, self._scenario.keys + _KEYS_PER_IMAGE * self._simulation.ends["published"]
        s3["LIST"] += min(keys, _MAX_LISTED_KEYS - 1) // _KEYS_PER_PAGE + 1
        s3["HEAD"] += 1 + (rows if keys > _MAX_LISTED_KEYS else 0)  # the bucket, and images that were not listed
        s3["PUT"] += _PUTS_PER_RUN

    def _row_processes(self, rows: Iterator[int]) -> list[Process]:
        if self._scenario.density == "steps":
            return [self._run_rows(rows) for _ in range(_ROWS_PER_CALL_IN_STEPS * self._scenario.max_in_flight)]
        return [self._run_chunks(rows) for _ in range(_CHUNKS_AT_ONCE)]

    def _run_chunks(self, rows: Iterator[int]) -> Process:
        while chunk := list(itertools.islice(rows, ROWS_PER_CHUNK)):
            queue = iter(chunk)
            yield self._clock.gather([self._run_rows(queue) for _ in range(self._scenario.max_in_flight)])

    def _run_rows(self, rows: Iterator[int]) -> Process:
        for row in rows:
            yield from self._run_row(row)

    def _run_row(self, row: int) -> Process:
        scenario, s3 = self._scenario, self._simulation.s3
        s3["HEAD"] += 1
        yield from self._compute(_FINDING)
        leased_at = self._clock.now
        end = yield from self._generate(random.Random(f"{scenario.random_seed} {row}"))  # noqa: S311 - no secret
        if end != "failed":
            yield self._clock.pause(scenario.transfer_seconds)
            for share in _PUBLISHING:
                yield from self._compute(share)
        if end == "published":
            s3["PUT"] += 2  # the sidecar and the image
        if scenario.results_in_bucket and end != "failed":
            kept = 2 if end == "published" else 1  # results of the call and of the download
            s3["GET"] += kept  # look-up of each result
            s3["PUT"] += kept
        if scenario.lease_seconds is not None:
            s3["HEAD"] += 1  # the previous holder of the lease may have published the image
            s3["PUT"] += 1 + int((self._clock.now - leased_at) / (scenario.lease_seconds * _RENEWED_AFTER))
            s3["DELETE"] += 1
        self._simulation.ends[end] += 1

    def _generate(self, draws: random.Random) -> Generator[Wait, None, _End]:
        """Call until the row succeeds or fails."""
        scenario, failures, lost = self._scenario, 0, 0
        while True:
            outcome = yield from self._call(draws)
            if outcome == "good":
                return "published"
            if outcome == "flagged":
                return "flagged"
            lost += outcome == "lost"
            if failures == scenario.retries or lost > scenario.repeat_unknown:
                return "failed"
            yield self._clock.pause(scenario.retry_delays[min(failures, len(scenario.retry_delays) - 1)])
            failures += 1

    def _call(self, draws: random.Random) -> Generator[Wait, None, _Outcome]:
        """Make one paid call, and repeat it while it is refused."""
        simulation, pacer, ticket = self._simulation, self._pacer, self._pacer.draw_ticket()
        for attempt in itertools.count():
            yield pacer.acquire(ticket)
            burst = pacer.burst
            yield simulation.gate.acquire
            yield from self._compute(_SENDING)
            outcome, seconds = self._draw(draws)
            simulation.outcomes[outcome] += 1
            simulation.service_seconds += seconds
            simulation.at_service += 1
            yield self._clock.pause(seconds)
            simulation.at_service -= 1
            yield from self._compute(_READING)
            simulation.gate.release()
            if outcome == "refused":
                pacer.refuse(burst, self._pause_after(attempt, draws))
                continue
            if outcome in {"good", "flagged"}:
                pacer.accept(burst)
            pacer.release()
            return outcome
        raise AssertionError("itertools.count is endless")

    def _pause_after(self, attempt: int, draws: random.Random) -> float:
        asked = self._scenario.retry_after
        return backoff(attempt, _FIRST_BACKOFF, _LONGEST_BACKOFF, draws.random) if asked is None else asked

    def _draw(self, draws: random.Random) -> tuple[_Outcome, float]:
        """Draw the outcome and the duration of a call."""
        scenario = self._scenario
        draw, seconds = draws.random(), scenario.latency.at(draws.random())
        if (draw := draw - scenario.refused) < 0 or self._simulation.at_service == scenario.service_in_flight:
            return "refused", 0.0
        if (draw := draw - scenario.failed) < 0:
            return "failed", seconds if scenario.failed_after is None else scenario.failed_after
        if (draw := draw - scenario.lost) < 0:
            return "lost", seconds
        return ("flagged" if draw < scenario.flagged else "good"), seconds

    def _compute(self, share: float) -> Process:
        seconds = share * self._scenario.cpu_seconds
        if seconds == 0:
            return
        yield self._core.acquire
        yield self._simulation.cores.acquire
        yield self._clock.pause(seconds)
        self.cpu_seconds += seconds
        self._simulation.cores.release()
        self._core.release()
