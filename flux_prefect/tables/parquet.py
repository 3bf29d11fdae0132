"""Reader of prompt tables in Parquet. Needs pyarrow, which the extra `parquet` installs."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from typing import Any

from flux_prefect.errors import TableError
from flux_prefect.tables.formats import UnreadableRow, check_header, describe_unstorable
from flux_prefect.tables.sources import Source

__all__ = ["MANIFEST_METADATA", "has_pyarrow", "load_pyarrow", "read_parquet"]

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


def read_parquet(source: Source) -> Iterator[tuple[int, Any]]:
    """Read the rows of a Parquet file, numbered from 1: each a dict of plain values, or `UnreadableRow`.

    NULL and NaN become None, times ISO 8601 text, durations seconds, decimals text, and bytes text (base64 where they
    are not UTF-8). Memory: 512 rows, and one page a column.

    Raises:
        TableError: pyarrow is missing, the file is broken or not Parquet, its columns are wrong, or it is a manifest.
    """
    number = 0
    for rows in _read_batches(source):
        for row in rows:
            number += 1
            problem = describe_unstorable(row)
            yield number, row if problem is None else UnreadableRow(f"it {problem}")


def _read_batches(source: Source) -> Iterator[list[dict[str, Any]]]:
    pyarrow, parquet = load_pyarrow()
    with source.open() as stream:
        try:
            file = parquet.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
            _check_schema(source, file.schema_arrow)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
                columns = [[_plain(value) for value in _in_microseconds(pyarrow, column)] for column in batch.columns]
                yield [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]
        except TableError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise TableError(f"{source.name} is not a Parquet file, or is broken ({error}).") from error


def _check_schema(source: Source, schema: Any) -> None:
    if MANIFEST_METADATA in (schema.metadata or {}):
        raise TableError(
            f"{source.name} is a manifest in Parquet, which can't be read as a table: use the .jsonl file beside it."
        )
    check_header(source, list(schema.names))


def _in_microseconds(pyarrow: Any, column: Any) -> list[Any]:
    """A column's values as Python objects. Python has no nanoseconds: times that have some become text."""
    kind = column.type
    if getattr(kind, "unit", None) != "ns":
        values: list[Any] = column.to_pylist()
    elif pyarrow.types.is_duration(kind):
        values = column.cast(pyarrow.duration("us"), safe=False).to_pylist()
    else:
        texts = column.cast(pyarrow.string()).to_pylist()
        values = [None if text is None else text.replace(" ", "T", 1) for text in texts]
    return values


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
