"""Prompt tables: where the requests of a batch come from.

A row has the fields of `ImageRequest` and an `id`; all other columns are carried through to the report untouched.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flux_prefect.api.models import ImageRequest

_FIELDS = frozenset(ImageRequest.model_fields)
_OWN_COLUMNS = _FIELDS | {"id"}
_TYPO = 0.85  # difflib's similarity from which a column counts as a field misspelt


@dataclass(frozen=True)
class _Unreadable:
    reason: str


class TableError(ValueError):
    """The table as a whole can't be read. Nothing was sent."""


@dataclass(frozen=True)
class Row:
    """One row: a request, or the reason why it is none.

    Attributes:
        number: its place among the data rows, from 1.
        id: the row's own id, else its number.
        request: the request, None for an invalid row.
        carried: the columns that are not ours, as they were.
        error: why the row is invalid, with the column and the remedy.
    """

    number: int
    id: str
    request: ImageRequest | None = None
    carried: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_table(source: str | Path | Sequence[ImageRequest | Mapping[str, Any]]) -> Iterator[Row]:
    """Read a CSV or JSON Lines file, or a list of requests or rows, row by row.

    A bad row becomes a `Row` with an error; the rows after it are read all the same. An empty cell means the
    field's default. A second row with the same id is invalid. A file is opened when its first row is asked for.

    Raises:
        TableError: the file is missing, not text, broken as a whole, or lacks the column `prompt`. Some of that is
            known only at a later row.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        name = str(source)
        match path.suffix.lower():
            case ".csv":
                raw = _read_csv(path)
            case ".jsonl" | ".ndjson":
                raw = _read_jsonl(path)
            case _:
                raise TableError(f"source {name!r} is neither .csv nor .jsonl: save the table as one of them.")
    else:
        raw = enumerate(source, start=1)
    return _check_ids(_parse(number, content) for number, content in raw)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as lines:
        reader = csv.reader(_text_only(path, lines), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
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
                        _Unreadable(
                            f"line {reader.line_num} has {len(cells)} cells where the header has {len(header)}: "
                            'put cells with commas, quotes or line breaks in "double quotes"'
                        ),
                    )
        except csv.Error as error:
            raise TableError(f"{path}, line {reader.line_num}: broken CSV ({error}).") from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as lines:
        number = 0
        try:
            for line_number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                number += 1
                yield number, _read_line(line_number, line)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error


def _read_line(number: int, line: str) -> Any:
    try:
        content = json.loads(line)
        # Half a character or 1e999 can be read, but no record can hold it.
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError as error:
        return _Unreadable(f"line {number} is not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return _Unreadable(f"line {number} holds a value that can't be kept ({error})")
    return content


def _text_only(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise TableError(f"{path} holds NUL bytes, as UTF-16 and binary files do: save it as UTF-8 text.")
        yield line


def _open(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise TableError(f"source {str(path)!r} can't be read: {error.strerror}.") from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> TableError:
    return TableError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8.")


def _check_header(path: Path, header: list[str]) -> None:
    if not any(header):
        raise TableError(f"{path} is empty: its first line must name the columns, prompt among them.")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise TableError(f"{path} has the column {repeated[0]!r} twice: rename one.")
    for name in header:
        if problem := _misspelt(name):
            raise TableError(f"{path}: {problem}.")
    if "prompt" not in header:
        raise TableError(f"{path} has no column 'prompt' among its columns {', '.join(header)}.")


def _misspelt(column: str) -> str | None:
    if column in _OWN_COLUMNS:
        return None
    plain = column.strip().lower().replace(" ", "_").replace("-", "_")
    likely = ["id"] if plain == "id" else difflib.get_close_matches(plain, _FIELDS, 1, _TYPO)
    if not likely:
        return None
    return f"unknown column {column!r}: if it is the field {likely[0]!r}, write it so; if not, give it another name"


def _parse(number: int, content: Any) -> Row:
    if isinstance(content, ImageRequest):
        return Row(number, str(number), content)
    if isinstance(content, _Unreadable):
        return Row(number, str(number), error=f"row {number}: {content.reason}")
    if not isinstance(content, Mapping):
        return Row(number, str(number), error=f"row {number} is not an object with a prompt")
    given = {name: value for name, value in content.items() if name in _FIELDS and value is not None and value != ""}
    carried = {name: value for name, value in content.items() if name not in _OWN_COLUMNS}
    own_id = content.get("id")
    row_id = str(number) if own_id is None or str(own_id).strip() == "" else str(own_id).strip()
    for name in carried:
        if problem := _misspelt(name):
            return Row(number, row_id, carried=carried, error=f"row {number}: {problem}")
    tolerance = given.get("safety_tolerance")
    if isinstance(tolerance, int) and not isinstance(tolerance, bool):
        given["safety_tolerance"] = str(tolerance)  # the service's digits in quotes are nobody's way to write a table
    try:
        request = ImageRequest.model_validate(given)
    except ValidationError as error:
        return Row(number, row_id, carried=carried, error=f"row {number}: {explain_invalid(error)}")
    return Row(number, row_id, request, carried)


def explain_invalid(error: ValidationError) -> str:
    """Each invalid field with its value and what is wrong with it, in one line."""
    problems = []
    for detail in error.errors(include_url=False):
        column = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "missing":
            problems.append(f"{column} is missing")
            continue
        shown = repr(detail["input"])
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"  # noqa: PLR2004 - a line's worth
        problems.append(f"{column} is {shown}: {detail['msg']}")
    return "; ".join(problems)


def _check_ids(rows: Iterable[Row]) -> Iterator[Row]:
    seen: dict[str, int] = {}
    for row in rows:
        first = seen.setdefault(row.id, row.number)
        if first != row.number and row.error is None:
            problem = f"row {row.number}: id {row.id!r} is the id of row {first} already: ids must differ"
            yield Row(row.number, row.id, carried=row.carried, error=problem)
        else:
            yield row
