"""`flux-prefect audit`: a manifest against its bucket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefect.client.schemas.objects import State
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flux_prefect.cli.flow_commands import FlowCommand, Given, one_line
from flux_prefect.cli.publish import batch_to_json
from flux_prefect.flows.audit_bucket import audit_bucket
from flux_prefect.manifest.audit import AuditReport

__all__ = ["audit"]


def _show(state: State[Any], report: AuditReport, _given: Given) -> Iterator[RenderableType]:
    if report.problems:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("id", "found", "outcome"):
            grid.add_column(column, overflow="fold")
        for each in report.problems:
            grid.add_row(Text(each.id), each.finding, Text(each.mended or each.message or each.key))
        yield grid
    if state.is_completed():
        yield one_line(state)


def _to_json(report: AuditReport) -> dict[str, Any]:
    batch = None if report.batch is None else batch_to_json(report.batch)
    return {**report.model_dump(mode="json", exclude={"batch"}), "batch": batch}


audit = FlowCommand(audit_bucket, first="manifest", show=_show, to_json=_to_json).build()
