"""`flux-prefect backfill`: the images of a range of days."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefect.client.schemas.objects import State
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flux_prefect.api.models import ImageSettings
from flux_prefect.batch.days import BackfillReport
from flux_prefect.cli.flow_commands import Extra, FlowCommand, Given, one_line
from flux_prefect.flows import backfill as flows

__all__ = ["backfill"]


def _show(state: State[Any], report: BackfillReport, _given: Given) -> Iterator[RenderableType]:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("day", "state", "what happened"):
        grid.add_column(column, overflow="fold")
    for outcome in report.days:
        grid.add_row(str(outcome.day), outcome.state, Text(outcome.message))
    yield grid
    if state.is_completed():
        yield one_line(state)


def _to_json(report: BackfillReport) -> dict[str, Any]:
    return report.model_dump(mode="json")


def _choose_order(given: Given) -> Given:
    return {**given, "order": "newest first"} if given["newest_first"] else given


backfill = FlowCommand(
    flows.backfill,
    first="source",
    show=_show,
    to_json=_to_json,
    models={"images": ImageSettings},
    extras={"newest_first": Extra(bool, default=False, help="The same as --order 'newest first'.")},
    prepare=_choose_order,
).build()
