"""One reading of a table, and what was found on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flux_prefect.tables.columns import OWN_COLUMNS, Columns, find_near_field

__all__ = ["Reading"]

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
_ENCODINGS = {"cp1252": "Windows-1252", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"}
_MOST_LISTED = 20


@dataclass
class Reading:
    """One reading of a table. It is complete once the last row was read.

    Attributes:
        columns: names the columns.
        delimiter: the delimiter of a CSV table.
        encoding: the encoding of a text table.
        passed_over: rows of which every cell is empty; they are no rows.
        fields: the columns that are fields of requests, each with its field.
        carried: the other columns.
    """

    columns: Columns = field(default_factory=Columns)
    delimiter: str | None = None
    encoding: str | None = None
    passed_over: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    _seen: set[tuple[str, ...]] = field(default_factory=set)

    def apply(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with its columns named, and note them.

        Raises:
            ValueError: two columns are one field, or a chosen column is missing.
        """
        named = self.columns.apply(content)
        header = tuple(content)
        if header not in self._seen and len(self._seen) < _MOST_LISTED:
            self._seen.add(header)
            self.note_header(header)
        return named

    def note_header(self, header: Iterable[str]) -> None:
        """Note which column is which field."""
        header = tuple(header)
        for column, name in zip(header, self.columns.names(header), strict=True):
            if name in OWN_COLUMNS:
                self.fields[column] = name
            elif column:
                self.carried[column] = name

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may not be as it was meant, each in one sentence without its full stop."""
        near = {column: find_near_field(column) for column in self.carried}
        return tuple(
            f"the column {column!r} is carried through: if it is the field {name!r}, rename it"
            for column, name in near.items()
            if name is not None
        )

    def describe(self) -> dict[str, str]:
        """Describe how the table was read, each part under its label. Parts that go without saying are left out."""
        described = {}
        renamed = [f"{column} as {name}" for column, name in self.fields.items() if column != name]
        if self.delimiter not in {None, ","}:
            described["delimiter"] = _DELIMITERS.get(self.delimiter or "", repr(self.delimiter))
        if self.encoding in _ENCODINGS:
            described["encoding"] = _ENCODINGS[self.encoding or ""]
        if renamed:
            described["columns read"] = ", ".join(renamed)
        if self.carried:
            others = list(map(str, self.carried))
            more = f" and {len(others) - _MOST_LISTED} more" if len(others) > _MOST_LISTED else ""
            described["columns carried through"] = f"{', '.join(others[:_MOST_LISTED])}{more}"
        if self.passed_over:
            described["empty rows passed over"] = f"{self.passed_over:,}"
        return described
