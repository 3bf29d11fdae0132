"""Readers of prompt tables in text formats: CSV, JSON Lines and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flux_prefect.errors import TableError
from flux_prefect.tables.encodings import find_encoding
from flux_prefect.tables.reading import Reading
from flux_prefect.tables.sources import Source

__all__ = ["UnreadableRow", "describe_unstorable", "read_csv", "read_json", "read_jsonl"]

_DELIMITERS = ",;\t|"
_SEP = re.compile(r'"?sep=([^\w "\r\n])"?\s*', re.IGNORECASE)  # the first line that Excel writes and obeys
_LONGEST_CELL = 16 * 1024 * 1024
_PIECE = 64 * 1024
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class UnreadableRow:
    """A row that could not be read, and the reason. It does not affect the rows after it."""

    reason: str


def read_csv(source: Source, reading: Reading | None = None) -> Iterator[tuple[int, Any]]:
    """Read the rows of a CSV file, numbered from 1: each a dict of strings, or `UnreadableRow`.

    The delimiter is that of a first line `sep=;`, else the first of comma, semicolon, tab and pipe (tab first in .tsv)
    that makes a header with the prompt's column. Columns without a name and without content are none, and cells beyond
    the header that are empty are none. A cell has at most 16 MiB.

    The standard library reads it: pyarrow's reader is an extra, forgives broken quotes, and stops at a row with a
    missing cell, which is a row's error here.

    Raises:
        TableError: the encoding can't be found, the header is wrong, or the quoting is broken.
    """
    reading = reading or Reading()
    # A limit of the whole process. It only ever grows, and other readers lose no check of what they read.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    with _open_text(source, reading) as lines:
        text = _text_only(source, lines)
        first = next(text, "")
        if sep := _SEP.fullmatch(first):
            reading.delimiter = sep[1]
            skipped, head = 1, list[str]()
        else:
            reading.delimiter = _find_delimiter(first, reading, tabs_first=source.format == "tsv")
            skipped, head = 0, [first]
        reader = csv.reader(_chain(head, text), delimiter=reading.delimiter, strict=True)
        started = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            reading.columns.check_header(source.name, header)
            reading.note_header(header)
            named = _Header(header)
            number = 0
            started = reader.line_num + 1
            for cells in reader:
                if cells:
                    number += 1
                    yield number, named.read(cells, reader.line_num + skipped, reading.delimiter)
                started = reader.line_num + 1
        except csv.Error as error:
            raise TableError(_describe_broken(source, started + skipped, reader.line_num + skipped, error)) from error


def read_jsonl(source: Source, reading: Reading | None = None) -> Iterator[tuple[int, Any]]:
    """Read the values of a JSON Lines file, numbered from 1: any JSON value, or `UnreadableRow`.

    Blank lines are skipped.

    Raises:
        TableError: the encoding can't be found.
    """
    with _open_text(source, reading or Reading()) as lines:
        number = 0
        for line_number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            number += 1
            yield number, _read_line(line_number, line)


def read_json(source: Source, reading: Reading | None = None) -> Iterator[tuple[int, Any]]:
    """Read the values of a JSON file that is an array, numbered from 1. A file that begins with { is JSON Lines.

    Memory: the largest value, and 64 KiB.

    Raises:
        TableError: the encoding can't be found, or the file is neither of both, or is broken.
    """
    reading = reading or Reading()
    with _open_text(source, reading) as text:
        elements = _Elements(source.name, text)
        if not elements.is_array():
            yield from read_jsonl(source, reading)
            return
        for number, (line, value) in enumerate(elements, start=1):
            problem = describe_unstorable(value)
            yield number, value if problem is None else UnreadableRow(f"line {line} {problem}")


def describe_unstorable(content: Any) -> str | None:
    """Explain why a value can't be stored in a record; None where it can.

    JSON can't hold half a character (a lone surrogate), infinity, NaN, or other types of Python objects.
    """
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return f"holds a value that can't be stored ({error})"
    return None


class _Header:
    """The columns of a CSV table, of which some have no name."""

    def __init__(self, header: list[str]) -> None:
        self._header = header
        self._unnamed = [place for place, name in enumerate(header) if not name]

    def read(self, cells: list[str], line: int, delimiter: str) -> Any:
        width = len(self._header)
        if len(cells) > width and not any(cells[width:]):
            cells = cells[:width]
        if len(cells) != width:
            return UnreadableRow(
                f"line {line} has {len(cells)} cells, but the header has {width}: "
                f'put cells with {_NAMES.get(delimiter, delimiter)}, quotes or line breaks in "double quotes"'
            )
        row = dict(zip(self._header, cells, strict=True))
        if not self._unnamed:
            return row
        filled = [place for place in self._unnamed if cells[place]]
        row.pop("")
        if filled and len(self._unnamed) > 1:
            return UnreadableRow(
                f"line {line} has {_shorten(cells[filled[0]])} in column {filled[0] + 1}, which has no name: "
                "name it in the header, or clear the cell"
            )
        return row | {"": cells[filled[0]]} if filled else row


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}


class _Elements:
    """The elements of a JSON array, read piece by piece, each with the line that it begins on."""

    def __init__(self, name: str, text: io.TextIOBase) -> None:
        self._name = name
        self._text = text
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._place = 0
        self._line = 1
        self._is_read = False

    def is_array(self) -> bool:
        """Check whether the file begins with [."""
        return self._next_sign() == "["

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self._advance(self._place + 1)
        if self._next_sign() == "]":
            self._end()
            return
        while True:
            self._next_sign()
            yield self._line, self._read_element()
            match self._next_sign():
                case ",":
                    self._advance(self._place + 1)
                case "]":
                    self._end()
                    return
                case _:
                    raise self._broken("a comma or ] is missing")

    def _end(self) -> None:
        self._advance(self._place + 1)
        if self._next_sign():
            raise self._broken("something follows the array")

    def _next_sign(self) -> str:
        while True:
            self._advance(_skip_space(self._buffer, self._place))
            if self._place < len(self._buffer):
                return self._buffer[self._place]
            if not self._read_more(_PIECE):
                return ""

    def _read_element(self) -> Any:
        size = _PIECE
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._place)
            except RecursionError as error:
                raise self._broken("it is nested too deeply") from error
            except ValueError as error:
                if not self._read_more(size):
                    raise self._broken(str(error)) from error
                size *= 2
                continue
            if end == len(self._buffer) and self._read_more(size):
                continue  # a number may go on
            self._advance(end)
            return value

    def _read_more(self, size: int) -> bool:
        piece = "" if self._is_read else self._text.read(size)
        self._is_read = not piece
        if piece:
            self._buffer, self._place = self._buffer[self._place :] + piece, 0
        return bool(piece)

    def _advance(self, place: int) -> None:
        self._line += self._buffer.count("\n", self._place, place)
        self._place = place

    def _broken(self, why: str) -> TableError:
        return TableError(
            f"{self._name}, line {self._line}: the JSON array is broken ({why}): correct it, or save the table as "
            "JSON Lines, of which the other rows can be read."
        )


def _skip_space(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    return place if space is None else space.end()


def _chain(*parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        yield from part


def _find_delimiter(line: str, reading: Reading, *, tabs_first: bool) -> str:
    candidates = "\t" + _DELIMITERS.replace("\t", "") if tabs_first else _DELIMITERS
    headers: dict[str, Sequence[str]] = {}
    for delimiter in candidates:
        try:
            cells = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:  # the table's own reader says what is wrong
            return ","
        headers[delimiter] = [name.strip() for name in cells]
        if reading.columns.has_prompt(headers[delimiter]):
            return delimiter
    return max(candidates, key=lambda delimiter: len(headers[delimiter]))


def _describe_broken(source: Source, first: int, last: int, error: csv.Error) -> str:
    lines = f"line {first}" if first >= last else f"lines {first} to {last}"
    reason = str(error)
    if "unexpected end" in reason:
        what = "the quoted cell that begins there has no end: close it with a quote"
    elif "expected after" in reason:
        what = 'a quoted cell has a quote in its middle: write each quote inside of it twice ("")'
    elif "field larger" in reason:
        what = f"a cell has more than {_LONGEST_CELL:,} characters, or its quote is not closed: close it"
    else:
        what = f"{reason}: save the table as CSV again"
    return f"{source.name}, {lines}: broken CSV ({what})."


@contextmanager
def _open_text(source: Source, reading: Reading) -> Iterator[io.TextIOWrapper]:
    """Open a table as text. Bytes that changed meanwhile and can't be decoded are a TableError."""
    reading.encoding = find_encoding(source)
    with io.TextIOWrapper(source.open(), encoding=reading.encoding, newline="") as lines:
        try:
            yield lines
        except UnicodeDecodeError as error:
            raise TableError(f"{source.name} is not {reading.encoding} text ({error.reason}): save it as UTF-8.") from (
                error
            )


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
            raise TableError(f"{source.name} has NUL bytes, as binary files do: save it as UTF-8 text.")
        yield line


def _shorten(value: str) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"  # noqa: PLR2004 - fits a line
