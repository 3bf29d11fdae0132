"""Forecasts as tables for a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, get_args

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from flux_prefect.forecast.latency import LatencyError, parse_latency
from flux_prefect.forecast.scenario import Forecast, Scenario
from flux_prefect.forecast.simulation import forecast
from flux_prefect.money.budget import describe_credits
from flux_prefect.pipeline import Density

__all__ = ["main", "tabulate_forecast"]

_MINUTE = 60


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _make_parser()
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    try:
        given["latency"] = parse_latency(given["latency"])
        scenario = Scenario.model_validate({name: value for name, value in given.items() if value is not None})
    except LatencyError as error:
        parser.error(str(error))
    except ValidationError as error:
        parser.error("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()))
    result = forecast(scenario)
    if as_json:
        print(result.model_dump_json(indent=2))  # noqa: T201 - for another program
    else:
        Console().print(tabulate_forecast(scenario, result))
    return 0


def tabulate_forecast(scenario: Scenario, result: Forecast) -> Table:
    """A forecast as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("forecast")
    table.add_column("", justify="right")
    asked = sum(result.s3_requests.values())
    told = {
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
        "S3 requests": f"{asked:,}" + (f", {asked / scenario.images:.1f} an image" if scenario.images else ""),
        **{f"  {operation}": f"{count:,}" for operation, count in result.s3_requests.items()},
    }
    for name, value in told.items():
        table.add_row(name, value)
    return table


def _describe_time(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours}:{minutes:02}:{rest:02}"


def _read_share(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def _read_delays(text: str) -> tuple[float, ...]:
    return tuple(float(seconds) for seconds in text.split(","))


# Fields of the scenario, how their values are written, and what stands for them in the help.
_OPTIONS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("images", int, "N"),
    ("workers", int, "N"),
    ("max_in_flight", int, "N"),
    ("max_in_flight_in_all", int, "N"),
    ("service_in_flight", int, "N"),
    ("shard_size", int, "ROWS"),
    ("refused", _read_share, "PERCENT"),
    ("failed", _read_share, "PERCENT"),
    ("lost", _read_share, "PERCENT"),
    ("flagged", _read_share, "PERCENT"),
    ("retry_after", float, "SECONDS"),
    ("failed_after", float, "SECONDS"),
    ("retries", int, "N"),
    ("retry_delays", _read_delays, "SECONDS,..."),
    ("repeat_unknown", int, "N"),
    ("cpu_seconds", float, "SECONDS"),
    ("cores", int, "N"),
    ("transfer_seconds", float, "SECONDS"),
    ("start_seconds", float, "SECONDS"),
    ("end_seconds", float, "SECONDS"),
    ("before_seconds", float, "SECONDS"),
    ("after_seconds", float, "SECONDS"),
    ("price", float, "CREDITS"),
    ("keys", int, "N"),
    ("lease_seconds", float, "SECONDS"),
    ("random_seed", int, "N"),
)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flux_prefect.forecast.summary", description="Forecast a batch: time, credits, S3 requests."
    )
    parser.add_argument(
        "--latency",
        required=True,
        metavar="SECONDS",
        help="of a call: 8, or median and 95th percentile as 6:20, or a file with the seconds of a call on each line",
    )
    for name, kind, metavar in _OPTIONS:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar=metavar,
            required=name == "images",
            help=_describe_field(name),
        )
    parser.add_argument("--density", choices=get_args(Density), help=_describe_field("density"))
    parser.add_argument("--results-in-bucket", action="store_true", help=_describe_field("results_in_bucket"))
    parser.add_argument("--json", action="store_true", help="print the forecast as JSON")
    return parser


def _describe_field(name: str) -> str:
    field = Scenario.model_fields[name]
    text = (field.description or "").replace("%", "%%")
    unset = field.is_required() or field.default in {None, False}
    return text if unset else f"{text.removesuffix('.')} (default {field.default})."


if __name__ == "__main__":
    sys.exit(main())
