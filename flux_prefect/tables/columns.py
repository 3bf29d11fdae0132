"""The names of a table's columns: which column is which field of a request."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux_prefect.api.models import ImageRequest
from flux_prefect.errors import TableError

__all__ = ["FIELDS", "OWN_COLUMNS", "Columns", "find_near_field"]

FIELDS = frozenset(ImageRequest.model_fields)
OWN_COLUMNS = FIELDS | {"id"}

_TYPO = 0.85  # difflib's similarity from which a column's name is near a field's
_MOST_HEADERS = 1000  # headers that are remembered; each line of JSON Lines can have its own


@dataclass(frozen=True)
class _Names:
    """The name of every column, in the header's order."""

    names: tuple[str, ...]
    are_unchanged: bool


class Columns:
    """Names columns after the fields that they hold, whatever their case and the spaces around them.

    A space or hyphen within a name counts as an underscore: "Aspect Ratio" is the field aspect_ratio. All other columns
    keep their names. A column with a field's name that is not the one chosen for it is named `input_` and its name.

    Args:
        chosen: the column of a field, or of `id`, by the field's name.

    Raises:
        TableError: a key is not a field, or two fields have one column.

    Example:
        ```python
        Columns({"prompt": "Beschreibung", "id": "SKU"}).apply({"SKU": 7, "Beschreibung": "a fox"})
        ```
    """

    def __init__(self, chosen: Mapping[str, str] | None = None) -> None:
        self._chosen = {field: column.strip() for field, column in (chosen or {}).items()}
        self._known: dict[tuple[str, ...], _Names] = {}
        for field in self._chosen:
            if field not in OWN_COLUMNS:
                raise TableError(
                    f"columns has {field!r}, which is not a field of a request: use {', '.join(sorted(OWN_COLUMNS))}."
                )
        columns = list(self._chosen.values())
        for column in columns:
            if not column or columns.count(column) > 1:
                raise TableError(f"columns has {column!r} for several fields: each field needs a column of its own.")

    def apply(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with its columns named.

        Raises:
            ValueError: two columns are one field, or a chosen column is missing.
        """
        names = self._resolve(tuple(content))
        return dict(content) if names.are_unchanged else dict(zip(names.names, content.values(), strict=True))

    def names(self, header: Iterable[str]) -> tuple[str, ...]:
        """Return the names of a header's columns, in its order.

        Raises:
            ValueError: two columns are one field, or a chosen column is missing.
        """
        return self._resolve(tuple(header)).names

    def has_prompt(self, header: Iterable[str]) -> bool:
        """Check whether one of the columns is the prompt."""
        try:
            return "prompt" in self.names(header)
        except ValueError:
            return True

    def check_header(self, source: str, header: Sequence[str]) -> None:
        """Check the columns of a table that names them once.

        Raises:
            TableError: there are no columns, a name occurs twice, two columns are one field, or the prompt is missing.
        """
        if not any(header):
            raise TableError(f"{source} is empty: its first line must name the columns, including prompt.")
        repeated = sorted({name for name in header if name and header.count(name) > 1})
        if repeated:
            raise TableError(f"{source} has the column {repeated[0]!r} twice: rename one.")
        try:
            names = self.names(header)
        except ValueError as error:
            raise TableError(f"{source}: {error}.") from error
        if "prompt" not in names:
            raise TableError(
                f"{source} has no column 'prompt' among its columns {', '.join(filter(None, header))}: rename the "
                "column that holds the prompts."
            )

    def _resolve(self, header: tuple[str, ...]) -> _Names:
        known = self._known.get(header)
        if known is None:
            if len(self._known) >= _MOST_HEADERS:
                self._known.clear()
            names = self._find_names(header)
            known = self._known[header] = _Names(names, names == header)
        return known

    def _find_names(self, header: tuple[str, ...]) -> tuple[str, ...]:
        fields = {self._find_chosen(field, column, header): field for field, column in self._chosen.items()}
        for column in header:
            if column in fields or (field := _plain(column)) not in OWN_COLUMNS or field in self._chosen:
                continue
            other = next((name for name, taken in fields.items() if taken == field), None)
            if other is not None:
                raise ValueError(f"the columns {other!r} and {column!r} are both the field {field!r}: rename one")
            fields[column] = field
        others = {name for name in header if name not in fields}
        names = []
        for column in header:
            name = fields.get(column, column)
            if column not in fields and column in OWN_COLUMNS:
                name = f"input_{column}"
                while name in others:
                    name = f"input_{name}"
            names.append(name)
        return tuple(names)

    def _find_chosen(self, field: str, column: str, header: tuple[str, ...]) -> str:
        for same in (str, str.strip, lambda name: name.strip().casefold()):
            found = [name for name in header if same(str(name)) == same(column)]
            if len(found) == 1:
                return found[0]
        raise ValueError(
            f"columns has {column!r} for {field}, and the columns are {', '.join(map(repr, header))}: correct columns"
        )


def find_near_field(column: str) -> str | None:
    """Return the field whose name is near a column's; None for a field itself and for all other columns."""
    plain = _plain(column)
    if plain in OWN_COLUMNS:
        return None
    return next(iter(difflib.get_close_matches(plain, FIELDS, 1, _TYPO)), None)


def _plain(column: Any) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_") if isinstance(column, str) else ""
