"""`flux-prefect sweep`: prompts in many variants, with contact sheets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefect.client.schemas.objects import State
from rich.console import RenderableType

from flux_prefect.cli.flow_commands import FlowCommand, Given, Special
from flux_prefect.cli.publish import batch_to_json, show_batch
from flux_prefect.flows.sweep_seeds import MAX_COMBINATIONS, SweepReport, sweep_seeds
from flux_prefect.manifest.report import BatchReport

__all__ = ["sweep"]


def _show(state: State[Any], report: SweepReport | BatchReport, given: Given) -> Iterator[RenderableType]:
    if isinstance(report, SweepReport):
        for prompt, uri in report.sheets.items():
            yield f"{uri}  {' '.join(prompt.split())[:60]}"
    yield from show_batch(state, _batch_of(report), given)


def _to_json(report: SweepReport | BatchReport) -> dict[str, Any]:
    """Of a sweep that failed, the batch alone."""
    batch = {"batch": batch_to_json(_batch_of(report))}
    return {**batch, "sheets": report.sheets} if isinstance(report, SweepReport) else batch


def _batch_of(report: SweepReport | BatchReport) -> BatchReport:
    return report.batch if isinstance(report, SweepReport) else report


def _read_seeds(given: list[str]) -> list[int]:
    try:
        ranges = [(int(first), int(last or first)) for first, _, last in (text.partition("-") for text in given)]
    except ValueError as error:
        raise ValueError(f"{' '.join(given)!r}: write numbers and ranges, such as 7 20-29") from error
    count = sum(max(0, last - first + 1) for first, last in ranges)
    if count > MAX_COMBINATIONS:
        raise ValueError(f"{' '.join(given)!r} are {count:,} seeds: a sweep has at most {MAX_COMBINATIONS:,} images")
    return [seed for first, last in ranges for seed in range(first, last + 1)]


sweep = FlowCommand(
    sweep_seeds,
    first="prompts",
    show=_show,
    to_json=_to_json,
    special={"seeds": Special(list[str], ["1-4"], _read_seeds)},
).build()
