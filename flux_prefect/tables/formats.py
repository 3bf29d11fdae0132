"""Readers of prompt tables in CSV and JSON Lines, and the checks that all formats share."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flux_prefect.api.models import ImageRequest
from flux_prefect.errors import TableError
from flux_prefect.tables.sources import Source

__all__ = [
    "FIELDS",
    "OWN_COLUMNS",
    "UnreadableRow",
    "check_header",
    "describe_misspelling",
    "describe_unstorable",
    "read_csv",
    "read_jsonl",
]

FIELDS = frozenset(ImageRequest.model_fields)
OWN_COLUMNS = FIELDS | {"id"}

_TYPO = 0.85  # difflib's similarity from which a column counts as a misspelt field


@dataclass(frozen=True)
class UnreadableRow:
    """A row that could not be read, and the reason. It does not affect the rows after it."""

    reason: str


def read_csv(source: Source) -> Iterator[tuple[int, Any]]:
    """Read the rows of a CSV file, numbered from 1: each a dict of strings, or `UnreadableRow`.

    Raises:
        TableError: the file is not UTF-8 text, its header is wrong, or its quoting is broken.
    """
    with io.TextIOWrapper(source.open(), encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(_text_only(source, lines), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            check_header(source, header)
            number = 0
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) == len(header):
                    yield number, dict(zip(header, cells, strict=True))
                else:
                    yield (
                        number,
                        UnreadableRow(
                            f"line {reader.line_num} has {len(cells)} cells, but the header has {len(header)}: "
                            'put cells with commas, quotes or line breaks in "double quotes"'
                        ),
                    )
        except csv.Error as error:
            raise TableError(f"{source.name}, line {reader.line_num}: broken CSV ({error}).") from error
        except UnicodeDecodeError as error:
            raise _not_utf8(source, error) from error


def read_jsonl(source: Source) -> Iterator[tuple[int, Any]]:
    """Read the values of a JSON Lines file, numbered from 1: any JSON value, or `UnreadableRow`.

    Blank lines are skipped.

    Raises:
        TableError: the file is not UTF-8 text.
    """
    with io.TextIOWrapper(source.open(), encoding="utf-8-sig", newline="") as lines:
        number = 0
        try:
            for line_number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                number += 1
                yield number, _read_line(line_number, line)
        except UnicodeDecodeError as error:
            raise _not_utf8(source, error) from error


def check_header(source: Source, header: list[str]) -> None:
    """Check the names of a table's columns.

    Raises:
        TableError: there are no columns, a name occurs twice, a name is a misspelt field, or `prompt` is missing.
    """
    if not any(header):
        raise TableError(f"{source.name} is empty: its first line must name the columns, including prompt.")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise TableError(f"{source.name} has the column {repeated[0]!r} twice: rename one.")
    for name in header:
        if problem := describe_misspelling(name):
            raise TableError(f"{source.name}: {problem}.")
    if "prompt" not in header:
        raise TableError(f"{source.name} has no column 'prompt' among its columns {', '.join(header)}.")


def describe_misspelling(column: str) -> str | None:
    """Describe the problem with a column that is probably a misspelt field of a request; None for any other column."""
    if column in OWN_COLUMNS:
        return None
    plain = column.strip().lower().replace(" ", "_").replace("-", "_")
    likely = ["id"] if plain == "id" else difflib.get_close_matches(plain, FIELDS, 1, _TYPO)
    if not likely:
        return None
    return f"unknown column {column!r}: if it is the field {likely[0]!r}, spell it that way; if not, rename the column"


def describe_unstorable(content: Any) -> str | None:
    """Explain why a value can't be stored in a record; None where it can.

    JSON can't hold half a character (a lone surrogate), infinity, NaN, or other types of Python objects.
    """
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return f"holds a value that can't be stored ({error})"
    return None


def _read_line(number: int, line: str) -> Any:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        return UnreadableRow(f"line {number} is not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return UnreadableRow(f"line {number} holds a value that can't be stored ({error})")
    problem = describe_unstorable(content)
    return content if problem is None else UnreadableRow(f"line {number} {problem}")


def _text_only(source: Source, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise TableError(f"{source.name} has NUL bytes, as UTF-16 and binary files do: save it as UTF-8 text.")
        yield line


def _not_utf8(source: Source, error: UnicodeDecodeError) -> TableError:
    return TableError(f"{source.name} is not UTF-8 text ({error.reason}): save it as UTF-8.")
