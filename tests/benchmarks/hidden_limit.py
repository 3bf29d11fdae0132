"""`python -m tests.benchmarks.hidden_limit`: measure the cost of an unknown limit compared with a known one.

The sandbox takes seven generations at once. Each line is one run of the client; in the first one its limit is set to
seven. Throughput is the service's time for the billed images, as a share of seven times the run's time. The first
line loses time to connections and a busy machine; the difference between the others and the first is pacing.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr
from rich.console import Console

from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox

from .tables import Table, compare

HIDDEN = 7
CALLS = 1_000
LATENCY = 0.25
_KEY = "sandbox-key-of-the-benchmark"
_RUNS = ((HIDDEN, None), (16, None), (16, 1.0), (50, None), (50, 1.0))


@dataclass(frozen=True)
class Run:
    """What came of the calls of one client.

    Attributes:
        refused: share of all calls that the service refused.
        throughput: mean generations at work at the service, of the seven.
        settled: seconds until the ceiling was within one of seven for good.
        near: share of the time from there in which the limit was within one of seven.
    """

    refused: float
    throughput: float
    settled: float
    near: float


def main() -> int:
    """Measure and print; the exit status is 0, whatever came out."""
    console = Console(highlight=False)
    logging.getLogger("flux_prefect").setLevel(logging.ERROR)  # the refusals are what is measured
    table = Table(
        f"{CALLS} calls of {LATENCY} s; at most 7 at once",
        "refused",
        "throughput",
        "of the first",
        "settled",
        "within 6-8",
    )
    runs: list[Run] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        start_sandbox(Path(folder), s3=False, api_key=_KEY) as sandbox,
    ):
        for max_in_flight, retry_after in _RUNS:
            run = asyncio.run(_measure(sandbox, max_in_flight, retry_after))
            runs.append(run)
            table.add(
                f"{max_in_flight}, {'no Retry-After' if retry_after is None else f'Retry-After {retry_after:g}'}",
                f"{100 * run.refused:.1f} %",
                f"{100 * run.throughput:.1f} %",
                f"{100 * run.throughput / runs[0].throughput:.1f} %",
                f"{run.settled:.1f} s",
                f"{100 * run.near:.0f} %",
            )
    table.print(console)
    found = runs[1:]
    compare(console, "refused, % of all calls", 100 * max(run.refused for run in found), most=5)
    compare(console, "throughput, % of what 7 allow", 100 * min(run.throughput for run in found), least=85)
    compare(console, "seconds until settled", max(run.settled for run in found), most=30)
    return 0


async def _measure(sandbox: RunningSandbox, max_in_flight: int, retry_after: float | None) -> Run:
    sandbox.control.reset()
    sandbox.control.settings(max_in_flight=HIDDEN, latency=LATENCY, retry_after=retry_after, fast=True)
    pacer = Pacer(max_in_flight)
    seen: list[tuple[float, int, int]] = []
    todo = iter(range(CALLS))

    async def generate(client: AimlApiClient) -> None:
        for number in todo:
            await client.generate(ImageRequest(prompt=f"lighthouse number {number}", seed=7))

    async def watch() -> None:
        started = time.monotonic()
        while True:
            seen.append((time.monotonic() - started, pacer.limit, pacer.ceiling or pacer.limit))
            await asyncio.sleep(0.02)

    async with AimlApiClient(api_key=SecretStr(_KEY), base_url=sandbox.url, pacer=pacer) as client:
        watching = asyncio.create_task(watch())
        started = time.monotonic()
        await asyncio.gather(*(generate(client) for _ in range(max_in_flight)))
        seconds = time.monotonic() - started
        watching.cancel()

    totals = sandbox.control.summary()
    settled = max((at for at, _, ceiling in seen if abs(ceiling - HIDDEN) > 1), default=0.0)
    after = [limit for at, limit, _ in seen if at > settled]
    return Run(
        refused=totals.refused / totals.calls,
        throughput=totals.billed_calls * LATENCY / (HIDDEN * seconds),
        settled=settled,
        near=sum(abs(limit - HIDDEN) <= 1 for limit in after) / len(after),
    )


if __name__ == "__main__":
    sys.exit(main())
