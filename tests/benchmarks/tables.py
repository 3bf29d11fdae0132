"""How results are shown."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable


class Table:
    """A line a contestant, a column a number."""

    def __init__(self, title: str, *columns: str) -> None:
        self._table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        self._table.add_column("")
        for column in columns:
            self._table.add_column(column, justify="right")

    def add(self, name: str, *values: str) -> None:
        """A line."""
        self._table.add_row(name, *values)

    def print(self, console: Console) -> None:
        """Show it."""
        console.print(self._table)


def compare(
    console: Console, what: str, value: float, *, least: float | None = None, most: float | None = None
) -> None:
    """One number, what is wanted of it, and whether it is so."""
    kept = (least is None or value >= least) and (most is None or value <= most)
    bounds = {"at least": least, "at most": most}
    wanted = ", ".join(f"{side} {bound:g}" for side, bound in bounds.items() if bound is not None)
    console.print(f"{what}: [bold {'green' if kept else 'red'}]{value:.2f}[/] (wanted: {wanted})")
