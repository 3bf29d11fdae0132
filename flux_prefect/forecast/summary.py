"""Table of a forecast for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from flux_prefect.forecast.scenario import Forecast, Scenario
from flux_prefect.money.budget import describe_credits

__all__ = ["tabulate_forecast"]

_MINUTE = 60


def tabulate_forecast(scenario: Scenario, result: Forecast) -> Table:
    """Format a forecast as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("forecast")
    table.add_column("", justify="right")
    requests = sum(result.s3_requests.values())
    cells = {
        "images": f"{scenario.images:,}",
        "runs": f"{len(scenario.shards()):,}, at most {scenario.workers} at a time",
        "published": f"{result.published:,}",
        "flagged": f"{result.flagged:,}",
        "failed": f"{result.failed:,}",
        "time": _describe_time(result.seconds),
        "images a second": f"{result.published / result.seconds:.2f}" if result.seconds else "",
        "calls": f"{result.calls:,}, {result.billed_calls:,} billed, {result.refused_calls:,} refused",
        "cost": describe_credits(result.credits),
        "calls at once, on average": f"{result.mean_in_flight:.1f}",
        "CPU of the busiest run": f"{100 * result.busiest_cpu:.0f} % of a core",
        "S3 requests": f"{requests:,}" + (f", {requests / scenario.images:.1f} an image" if scenario.images else ""),
        **{f"  {operation}": f"{count:,}" for operation, count in result.s3_requests.items()},
    }
    for name, value in cells.items():
        table.add_row(name, value)
    return table


def _describe_time(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours}:{minutes:02}:{rest:02}"
