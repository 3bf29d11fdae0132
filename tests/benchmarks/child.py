"""The process that is measured: one contestant, one table. Started by `measuring`.

It makes everything ready, publishes one image to warm up, says so, waits for a line of input, and works.
"""

from __future__ import annotations

import asyncio
import atexit
import cProfile
import resource
import sys
import time
from pathlib import Path

from pydantic import BaseModel

from .contestants import Name, open_contestant
from .processes import own_peak_memory

READY = "ready"


class BatchContext(BaseModel):
    """What one process does."""

    contestant: Name
    in_flight: int
    prefix: str
    warm_up: Path
    table: Path
    profile: Path | None = None


class Usage(BaseModel):
    """What it took, from the line of input on."""

    seconds: float
    """Until the contestant was done."""
    cpu_seconds: float
    """Until the process was, so that what Prefect sends in the background counts."""
    peak_memory: int
    """In bytes, over the whole life of the process."""
    s3_calls: dict[str, int]


class _Meter:
    """The stopwatch. It is read when the process ends."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.s3_calls: dict[str, int] = {}
        self._cpu = 0.0

    def start(self) -> None:
        self._cpu = _own_cpu()

    def report(self) -> None:
        if self.seconds is not None:  # else the run failed, and the traceback is printed
            usage = Usage(
                seconds=self.seconds,
                cpu_seconds=_own_cpu() - self._cpu,
                peak_memory=own_peak_memory(),
                s3_calls=self.s3_calls,
            )
            print(usage.model_dump_json(), flush=True)


async def _work(job: BatchContext, meter: _Meter) -> None:
    async with open_contestant(job.contestant, job.in_flight, job.prefix) as contender:
        await contender.publish(job.warm_up)
        contender.s3_calls.clear()
        print(READY, flush=True)
        # In a thread: the loop must go on answering for the connections that are open.
        if not await asyncio.to_thread(sys.stdin.readline):
            return
        profiler = cProfile.Profile()
        meter.start()
        started = time.perf_counter()
        if job.profile is not None:
            profiler.enable()
        await contender.publish(job.table)
        if job.profile is not None:
            profiler.disable()
            profiler.dump_stats(job.profile)
        meter.seconds = time.perf_counter() - started
        meter.s3_calls = dict(contender.s3_calls)


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Do the job that standard input's first line names."""
    meter = _Meter()
    # Before Prefect is imported, so that it comes after Prefect's own, which send what is left in its queues.
    atexit.register(meter.report)
    asyncio.run(_work(BatchContext.model_validate_json(sys.stdin.readline()), meter))


if __name__ == "__main__":
    main()
