"""`flux-prefect forecast`: forecast the duration, the cost and the S3 requests of a batch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from flux_prefect.cli.exit_status import MISUSED
from flux_prefect.cli.options import make_command, make_option, plain_kind, show_as
from flux_prefect.forecast.latency import LatencyError, parse_latency
from flux_prefect.forecast.scenario import Scenario
from flux_prefect.forecast.simulation import forecast as simulate
from flux_prefect.forecast.summary import tabulate_forecast

__all__ = ["forecast"]


def _read_share(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def _read_delays(text: str) -> tuple[float, ...]:
    return tuple(float(seconds) for seconds in text.split(","))


# Parsers of values that are not plain numbers or words, and what the help adds to their descriptions.
_WRITTEN: dict[str, tuple[Callable[[str], Any], str]] = {
    "latency": (
        parse_latency,
        "8, or the median and the 95th percentile as 6:20, or a file with the seconds of a call on each line.",
    ),
    **dict.fromkeys(("refused", "failed", "lost", "flagged"), (_read_share, "In percent.")),
    "retry_delays": (_read_delays, "Seconds, separated by commas."),
}


def _forecast(given: dict[str, Any]) -> int:
    as_json = given.pop("json")
    fields = {name: value for name, value in given.items() if value is not None}
    try:
        scenario = Scenario.model_validate(
            {name: _WRITTEN[name][0](value) if name in _WRITTEN else value for name, value in fields.items()}
        )
    except LatencyError as error:
        return _refuse(str(error))
    except ValidationError as error:
        return _refuse("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()))
    except ValueError as error:
        return _refuse(f"a percentage or a delay must be a number ({error}): write 2.5, or 2,8,30")
    result = simulate(scenario)
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        Console().print(tabulate_forecast(scenario, result))
    return 0


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return MISUSED


def _options() -> Iterator[inspect.Parameter]:
    for name, info in Scenario.model_fields.items():
        text = info.description or ""
        kind: Any = str
        if name in _WRITTEN:
            text = f"{text} {_WRITTEN[name][1]}"
        else:
            kind = plain_kind(info.annotation)
        if info.is_required():
            yield make_option(name, kind, help=text)
        elif kind is bool:
            yield make_option(name, kind, info.default, help=text)
        else:
            yield make_option(name, kind | None, None, help=text, show_default=show_as(info.default))
    yield make_option("json", bool, default=False, help="Print the forecast as one JSON object.")


forecast = make_command(_forecast, _options())
