"""The rows of a source in whatever format: one reader for each, and one for folders of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flux_prefect.errors import TableError
from flux_prefect.tables.cells import is_nothing
from flux_prefect.tables.formats import UnreadableRow, read_csv, read_json, read_jsonl
from flux_prefect.tables.parquet import read_arrow, read_parquet
from flux_prefect.tables.reading import Reading
from flux_prefect.tables.sources import Format, Source

__all__ = ["read_rows"]

_READERS: dict[Format, Callable[[Source, Reading], Iterator[tuple[int, Any]]]] = {
    "arrow": read_arrow,
    "csv": read_csv,
    "json": read_json,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "tsv": read_csv,
}


_WITH_HEADER: set[Format] = {"arrow", "csv", "parquet", "tsv"}


def read_rows(source: Source, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Read the rows of a table, numbered from 1: each a dict, another JSON value, or `UnreadableRow`.

    A row of a table with a header of which every cell is empty is none, but counts for the numbers of the rows after
    it. The rows of a folder are those of its files in the order of their names. Values of a folder's name such as
    `country=de` are a column of the rows below it. An unreadable row has the name of its file.

    Raises:
        TableError: the table can't be read as a whole. Some reasons are found only at a later row.
    """
    for number, content in _read_all(source, reading):
        if isinstance(content, _Empty):
            reading.passed_over += 1
        else:
            yield number, content


class _Empty:
    """A row of which every cell is empty."""


def _read_all(source: Source, reading: Reading) -> Iterator[tuple[int, Any]]:
    total = 0
    for part in source.parts or (source,):
        number = 0
        for number, content in _READERS[part.format](part, reading):
            is_empty = (
                part.format in _WITH_HEADER and isinstance(content, Mapping) and all(map(is_nothing, content.values()))
            )
            yield (
                total + number,
                _Empty() if is_empty else _complete(part, number, content) if source.parts else content,
            )
        total += number


def _complete(part: Source, number: int, content: Any) -> Any:
    if isinstance(content, UnreadableRow):
        return UnreadableRow(f"{content.reason} (row {number} of {part.name})")
    if not isinstance(content, Mapping) or not part.partition:
        return content
    for name, value in part.partition.items():
        if name in content and str(content[name]) != value:
            raise TableError(
                f"{part.name}, row {number}: {name} is {content[name]!r}, and the folder's name says {value!r}: "
                "correct the folder's name or the column."
            )
    return {**part.partition, **content}
