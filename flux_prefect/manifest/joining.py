"""A table with what became of its rows: the images' addresses beside the columns that they were made from."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import anyio.to_thread

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import TableError
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.tables.cells import read_id, read_seed_id
from flux_prefect.tables.parquet import load_pyarrow
from flux_prefect.tables.sources import open_source

__all__ = ["IMAGE_COLUMN_TYPES", "join_images", "read_parquet_table", "write_parquet_table"]

IMAGE_COLUMN_TYPES = {
    "image_status": "string",
    "image_uri": "string",
    "image_sha256": "string",
    "image_width": "int32",
    "image_height": "int32",
    "image_seed": "int64",
    "image_error": "string",
}
"""The columns that `join_images` adds, and their Arrow types."""


async def read_parquet_table(source: str, bucket: ImageBucket) -> Any:
    """Read a Parquet file from a path, s3://… or https://… into a `pyarrow.Table`. For tables that fit into memory.

    Args:
        source: The file.
        bucket: Its keys and endpoint are used for a file in the same bucket.

    Raises:
        TableError: it can't be read, or is no Parquet.
    """
    pyarrow, parquet = load_pyarrow()
    async with open_source(source, bucket=bucket) as fetched:
        try:
            with fetched.open() as file:
                return await anyio.to_thread.run_sync(parquet.read_table, file)
        except (pyarrow.ArrowException, OSError) as error:
            raise TableError(f"{fetched.name} is not a Parquet file, or is broken ({error}).") from error


def join_images(table: Any, records: Iterable[ItemRecord], id_column: str = "id") -> Any:
    """Add the columns of `IMAGE_COLUMN_TYPES` to a `pyarrow.Table` by id, in place of those of an earlier join.

    A row without a record gets nulls. Of a record with several images the first counts.
    """
    pyarrow, _ = load_pyarrow()
    outcomes = {record.id: _describe(record) for record in records}
    ids = table.column(id_column).to_pylist()
    # Manifests of release 0.1.0 have ids such as "1.0" as they were written.
    rows = [outcomes.get(read_id(value)) or outcomes.get(read_seed_id(value), {}) for value in ids]
    table = table.drop_columns([name for name in table.column_names if name in IMAGE_COLUMN_TYPES])
    for name, kind in IMAGE_COLUMN_TYPES.items():
        values = pyarrow.array([row.get(name) for row in rows], type=getattr(pyarrow, kind)())
        table = table.append_column(name, values)
    return table


async def write_parquet_table(table: Any, bucket: ImageBucket, path: str) -> str:
    """Write a `pyarrow.Table` to a path below the bucket's prefix, replacing what is there; returns its s3:// address.

    Raises:
        ValueError: the path leaves the prefix.
        BucketError: the bucket did not take it.
    """
    _, parquet = load_pyarrow()
    with io.BytesIO() as file:
        await anyio.to_thread.run_sync(parquet.write_table, table, file)
        file.seek(0)
        await bucket.put_file(path, file, content_type="application/vnd.apache.parquet", cache_control="no-cache")
    return f"{bucket.uri}/{path}"


def _describe(record: ItemRecord) -> dict[str, Any]:
    columns: dict[str, Any] = {"image_status": record.status, "image_error": record.message}
    if record.images:
        image = record.images[0]
        columns |= {f"image_{name}": getattr(image, name) for name in ("uri", "sha256", "width", "height", "seed")}
    return columns
