"""Readers of prompt tables in Parquet and Arrow IPC. They need pyarrow, which the extra `parquet` installs."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from typing import Any, BinaryIO

from flux_prefect.errors import TableError
from flux_prefect.tables.formats import UnreadableRow, describe_unstorable
from flux_prefect.tables.reading import Reading
from flux_prefect.tables.sources import Source

__all__ = ["MANIFEST_METADATA", "has_pyarrow", "load_pyarrow", "read_arrow", "read_parquet"]

MANIFEST_METADATA = b"flux_prefect.manifest"
"""The metadata key that marks the schema of a manifest."""

_ROWS_AT_ONCE = 512
_BUFFER = 1024 * 1024


def has_pyarrow() -> bool:
    """Whether Parquet can be read and written here."""
    return importlib.util.find_spec("pyarrow") is not None


def load_pyarrow() -> tuple[Any, Any]:
    """Import the modules `pyarrow` and `pyarrow.parquet`. The first call takes about 0.2 s and 50 MB of memory.

    Raises:
        TableError: they are not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise TableError("Parquet needs pyarrow: pip install 'flux_prefect[parquet]'.") from error


def read_parquet(source: Source, reading: Reading | None = None) -> Iterator[tuple[int, Any]]:
    """Read the rows of a Parquet file, numbered from 1: each a dict of plain values, or `UnreadableRow`.

    NULL and NaN become None, times ISO 8601 text, durations seconds, decimals text, bytes text (base64 where they are
    not UTF-8), structs objects, lists lists, and maps lists of pairs. Memory: 512 rows, and one page a column.

    Raises:
        TableError: pyarrow is missing, the file is broken or not Parquet, its columns are wrong, or it is a manifest.
    """

    def batches(stream: BinaryIO) -> Iterator[Any]:
        file = importlib.import_module("pyarrow.parquet").ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
        _check_schema(source, file.schema_arrow, reading or Reading())
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False)

    return _number(_read_batches(source, "a Parquet file", batches))


def read_arrow(source: Source, reading: Reading | None = None) -> Iterator[tuple[int, Any]]:
    """Read the rows of an Arrow IPC file or stream (.arrow, .feather) as `read_parquet` does.

    Memory: one batch of the file.

    Raises:
        TableError: pyarrow is missing, the file is broken or not Arrow, or its columns are wrong.
    """

    def batches(stream: BinaryIO) -> Iterator[Any]:
        ipc = importlib.import_module("pyarrow.ipc")
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        file = ipc.open_file(stream) if is_file else ipc.open_stream(stream)
        _check_schema(source, file.schema, reading or Reading())
        pieces = (file.get_batch(index) for index in range(file.num_record_batches)) if is_file else file
        for piece in pieces:
            for start in range(0, piece.num_rows, _ROWS_AT_ONCE):
                yield piece.slice(start, _ROWS_AT_ONCE)

    return _number(_read_batches(source, "an Arrow file", batches))


def _number(pieces: Iterator[list[dict[str, Any]]]) -> Iterator[tuple[int, Any]]:
    number = 0
    for rows in pieces:
        for row in rows:
            number += 1
            problem = describe_unstorable(row)
            yield number, row if problem is None else UnreadableRow(f"it {problem}")


def _read_batches(
    source: Source, kind: str, batches: Callable[[BinaryIO], Iterator[Any]]
) -> Iterator[list[dict[str, Any]]]:
    pyarrow, _ = load_pyarrow()
    with source.open() as stream:
        try:
            for batch in batches(stream):
                columns = [[_plain(value) for value in _in_microseconds(pyarrow, column)] for column in batch.columns]
                yield [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]
        except TableError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise TableError(f"{source.name} is not {kind}, or is broken ({error}).") from error


def _check_schema(source: Source, schema: Any, reading: Reading) -> None:
    if MANIFEST_METADATA in (schema.metadata or {}):
        raise TableError(
            f"{source.name} is a manifest in Parquet, which can't be read as a table: use the .jsonl file beside it."
        )
    reading.columns.check_header(source.name, list(schema.names))
    reading.note_header(schema.names)


def _in_microseconds(pyarrow: Any, column: Any) -> list[Any]:
    """A column's values as Python objects. Python has no nanoseconds: times that have some become text."""
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pyarrow.types.is_nested(kind) and "[ns" in str(kind):
        return [_nested(pyarrow, value) for value in column]
    if getattr(kind, "unit", None) != "ns":
        values: list[Any] = column.to_pylist()
    elif pyarrow.types.is_duration(kind):
        values = column.cast(pyarrow.duration("us"), safe=False).to_pylist()
    else:
        texts = column.cast(pyarrow.string()).to_pylist()
        values = [None if text is None else text.replace(" ", "T", 1) for text in texts]
    return values


def _nested(pyarrow: Any, value: Any) -> Any:  # noqa: PLR0911 - one line for each type of value
    """The Python value of an Arrow scalar that may hold times in nanoseconds."""
    kind = value.type
    if not value.is_valid:
        return None
    if pyarrow.types.is_map(kind):
        return [[_nested(pyarrow, inner) for inner in dict(pair).values()] for pair in value.values]
    if pyarrow.types.is_struct(kind):
        return {name: _nested(pyarrow, inner) for name, inner in value.items()}
    if pyarrow.types.is_nested(kind):
        return [_nested(pyarrow, inner) for inner in value.values]
    if getattr(kind, "unit", None) != "ns":
        return value.as_py()
    if pyarrow.types.is_duration(kind):
        return value.cast(pyarrow.duration("us"), safe=False).as_py()
    if value.value % 1000 == 0:
        return value.as_py()
    return str(value.cast(pyarrow.string()).as_py()).replace(" ", "T", 1)


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one line for each type of value
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")
