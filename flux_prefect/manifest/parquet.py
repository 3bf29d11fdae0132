"""Writing a manifest as a Parquet file, for analysis.

There is a column for every field of a record, of its request and of its first image, with the same name and type in
every run; then the table's other columns under their own names, prefixed with `input_` where those are taken.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.tables.manifest_lines import VERSION
from flux_prefect.tables.parquet import MANIFEST_METADATA, load_pyarrow

__all__ = ["IMAGE_COLUMNS", "write_parquet"]

IMAGE_COLUMNS = ("sha256", "width", "height", "key", "uri", "url")
"""The fields of a record's first image that have columns of their own; `images` has all images as JSON."""

_ROWS_AT_ONCE = 200
_BATCHES_A_GROUP = 5  # large groups read faster, but a group is in memory until it is written, about 5 kB a row
_Item = TypeVar("_Item")
_INT64 = 2**63
_EXACT_IN_FLOAT = 2**53


def write_parquet(records: Callable[[], Iterable[dict[str, Any]]], file: BinaryIO) -> None:
    """Write records as Parquet. Reads them twice. Memory: 200 rows, and 1,000 in Arrow's format.

    Raises:
        TableError: pyarrow is missing.
    """
    pyarrow, parquet = load_pyarrow()
    own = _own_columns()
    carried = _name_carried(_find_carried(records()), taken=own)
    kinds = own | dict(carried.values())
    types = {
        "integer": pyarrow.int64(),
        "number": pyarrow.float64(),
        "boolean": pyarrow.bool_(),
        "strings": pyarrow.list_(pyarrow.string()),
    }
    schema = pyarrow.schema(
        [(column, types.get(kind, pyarrow.string())) for column, kind in kinds.items()],
        metadata={MANIFEST_METADATA: str(VERSION).encode()},
    )
    with parquet.ParquetWriter(file, schema) as writer:
        rows = (_flatten(record, carried) for record in records())
        batches = (_to_batch(pyarrow, schema, kinds, piece) for piece in _in_pieces(rows, _ROWS_AT_ONCE))
        for group in _in_pieces(batches, _BATCHES_A_GROUP):
            writer.write_table(pyarrow.Table.from_batches(group))


def _to_batch(pyarrow: Any, schema: Any, kinds: dict[str, str], rows: list[dict[str, Any]]) -> Any:
    arrays = [
        pyarrow.array([_fit(row.get(field.name), kinds[field.name]) for row in rows], type=field.type)
        for field in schema
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema)


def _own_columns() -> dict[str, str]:
    """The columns of every manifest with the kind of each, derived from the models."""
    images = _fields(PublishedImage)
    columns = {"run": "string"}
    for name, kind in _fields(ItemRecord).items():
        if name == "request":
            columns |= {field: kind for field, kind in _fields(ImageRequest).items() if field not in columns}
        elif name != "carried":
            columns[name] = kind
    return {**columns, **{name: images[name] for name in IMAGE_COLUMNS}}


def _fields(model: type[ItemRecord | ImageRequest | PublishedImage]) -> dict[str, str]:
    properties = model.model_json_schema(mode="serialization")["properties"]
    return {name: _kind(schema) for name, schema in properties.items()}


def _kind(schema: dict[str, Any]) -> str:
    match [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]:
        case [{"type": "integer" | "number" | "boolean" | "string" as kind}]:
            return str(kind)
        case [{"type": "array", "items": {"type": "string"}}]:
            return "strings"
        case _:
            return "text"


def _find_carried(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The carried columns in the order of their first appearance, each with a kind that fits all its values."""
    seen: dict[str, set[str]] = {}
    for record in records:
        for name, value in record["carried"].items():
            seen.setdefault(name, set()).add(_kind_of(value))
    return {name: _common_kind(kinds - {"null"}) for name, kinds in seen.items()}


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        size = abs(value)
        return "small" if size <= _EXACT_IN_FLOAT else "integer" if size < _INT64 else "text"
    return "number" if isinstance(value, float) else "text"


def _common_kind(kinds: set[str]) -> str:
    if kinds == {"boolean"}:
        return "boolean"
    if kinds and kinds <= {"small", "integer"}:
        return "integer"
    if kinds and kinds <= {"small", "number"}:
        return "number"
    return "text"


def _name_carried(kinds: dict[str, str], taken: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The Parquet column's name and kind for each carried column.

    Names are compared case-insensitively, as most query engines do.
    """
    used = {name.lower() for name in taken}
    own_names = {name.lower() for name in kinds}
    columns = {}
    for name, kind in kinds.items():
        column = name
        while not column or column.lower() in used or (column != name and column.lower() in own_names):
            column = f"input_{column}"
        used.add(column.lower())
        columns[name] = (column, kind)
    return columns


def _flatten(record: dict[str, Any], carried: dict[str, tuple[str, str]]) -> dict[str, Any]:
    row = {**(record["request"] or {}), **record}
    for name, value in record["carried"].items():
        row[carried[name][0]] = value
    return row


def _fit(value: Any, kind: str) -> Any:
    if kind != "text" or value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _in_pieces(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while piece := list(itertools.islice(items, size)):
        yield piece
