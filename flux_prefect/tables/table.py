"""Prompt tables: the rows of a batch and their requests.

A row has the fields of `ImageRequest` and an `id`; all other columns are copied to the report unchanged.
The manifest of an earlier run is a table as well: its rows are read with the seeds that they had.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import TableError, TooFewRows
from flux_prefect.tables.formats import (
    FIELDS,
    OWN_COLUMNS,
    UnreadableRow,
    describe_misspelling,
    describe_unstorable,
    read_csv,
    read_jsonl,
)
from flux_prefect.tables.manifest_lines import is_manifest, is_record, read_records
from flux_prefect.tables.parquet import read_parquet
from flux_prefect.tables.sources import Source, local_source, open_source

__all__ = ["Only", "Row", "Table", "explain_invalid", "open_table", "read_table"]

Only = Literal["failed", "flagged", "skipped_budget", "unpublished"]
"""The rows of a manifest to process: those with one status, or `unpublished`, which is failed and skipped_budget.

Flagged rows are not among the unpublished: the same seed would be paid for and flagged again."""

_STATUSES: dict[Only, set[str]] = {
    "failed": {"failed"},
    "flagged": {"flagged"},
    "skipped_budget": {"skipped_budget"},
    "unpublished": {"failed", "skipped_budget"},
}

InlineRows: TypeAlias = Sequence[ImageRequest | Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row: a request, or the reason why the row is invalid.

    Attributes:
        number: its place among the data rows, from 1. A manifest's rows keep the numbers of their table.
        id: the row's own id, else its number.
        request: the request; None for an invalid row.
        carried: the columns that are neither fields of a request nor the id, unchanged.
        error: why the row is invalid, with the column and the remedy.
    """

    number: int
    id: str
    request: ImageRequest | None = None
    carried: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Table:
    """A table on this machine. It can be read any number of times.

    Args:
        content: a fetched or local source, or the requests or rows themselves.
        only: read only these rows of a manifest.
    """

    def __init__(self, content: Source | InlineRows, only: Only | None = None) -> None:
        self._content = content
        self._only = only

    def rows(self) -> Iterator[Row]:
        """Read all rows from the first, one at a time.

        An invalid row becomes a `Row` with an error; the rows after it are read as usual. An empty cell stands for the
        field's default. A second row with the same id is invalid. Memory: the ids, about 150 bytes a row.

        Raises:
            TableError: the file is missing, not text, broken as a whole, or lacks the column `prompt`; or `only` is
                set and the table is not a manifest. Some of these are found only at a later row.
        """
        return _check_ids(self._parse_all())

    def check_rows(self, least: int) -> None:
        """Verify that the table has at least `least` rows, valid or not. Rows that `only` leaves out count.

        Raises:
            TooFewRows: it has fewer.
            TableError: as for `rows`.
        """
        found = sum(1 for _ in itertools.islice(self._read(), least))
        if found < least:
            name = self._content.name if isinstance(self._content, Source) else "the list"
            raise TooFewRows(
                f"source {name!r} has {found:,} rows and min_rows is {least:,}: correct what writes the table, or set "
                "min_rows to the number of rows that it may have. Nothing was sent."
            )

    def _parse_all(self) -> Iterator[Row]:
        for number, content in self._read():
            if is_record(content):
                if self._only is None or content["status"] in _STATUSES[self._only]:
                    yield _restore(content)
            elif self._only is None:
                yield _parse(number, content)
            else:
                raise TableError(f"only={self._only!r} needs the manifest of an earlier run, and this is not one.")

    def _read(self) -> Iterator[tuple[int, Any]]:
        if not isinstance(self._content, Source):
            yield from _read_inline(self._content)
        elif self._content.format == "csv":
            yield from read_csv(self._content)
        elif self._content.format == "parquet":
            yield from read_parquet(self._content)
        else:
            with self._content.open() as file:
                if is_manifest(file):
                    file.seek(0)
                    yield from enumerate(read_records(file, self._content.name), start=1)
                    return
            yield from read_jsonl(self._content)


@asynccontextmanager
async def open_table(
    source: str | Path | InlineRows, *, only: Only | None = None, bucket: ImageBucket | None = None
) -> AsyncIterator[Table]:
    """Open a table from any source. A remote table is fetched once, then read row by row any number of times.

    Args:
        source: a path, `s3://bucket/key` or `https://` address that ends in .csv, .jsonl, .ndjson or .parquet, or a
            list of requests or rows.
        only: read only these rows of a manifest.
        bucket: its keys and endpoint are used for a source in the same bucket.

    Raises:
        TableError: the source can't be fetched, or its suffix is unknown.

    Example:
        ```python
        async with open_table("s3://images/prompts.csv") as table:
            count = sum(1 for _ in table.rows())
            for row in table.rows():
                ...
        ```
    """
    if isinstance(source, (str, Path)):
        async with open_source(source, bucket=bucket) as fetched:
            yield Table(fetched, only)
    else:
        yield Table(source, only)


def read_table(source: str | Path | InlineRows, *, only: Only | None = None) -> Iterator[Row]:
    """Read a file on this machine, or a list of requests or rows, once and row by row.

    A file is opened when its first row is read. See `Table.rows` for the rows, and `open_table` for addresses.

    Raises:
        TableError: as for `Table.rows`; immediately where the suffix is unknown.

    Example:
        ```python
        for row in read_table("prompts.csv"):
            print(row.number, row.id, row.error or row.request.label)
        ```
    """
    return Table(local_source(source) if isinstance(source, (str, Path)) else source, only).rows()


def _read_inline(contents: InlineRows) -> Iterator[tuple[int, Any]]:
    for number, content in enumerate(contents, start=1):
        given = dict(content) if isinstance(content, Mapping) else content
        problem = None if isinstance(given, ImageRequest) else describe_unstorable(given)
        yield number, given if problem is None else UnreadableRow(f"it {problem}")


def _restore(record: Mapping[str, Any]) -> Row:
    """The row that a manifest record was written for."""
    number, row_id, carried = record["row"], record["id"], dict(record["carried"])
    if record["request"] is None:
        return Row(number, row_id, carried=carried, error=record.get("message") or f"row {number}: it was invalid")
    try:
        request = ImageRequest.model_validate(record["request"])
    except ValidationError as error:
        return Row(number, row_id, carried=carried, error=f"row {number}: {explain_invalid(error)}")
    return Row(number, row_id, request, carried)


def _parse(number: int, content: Any) -> Row:
    if isinstance(content, ImageRequest):
        return Row(number, str(number), content)
    if isinstance(content, UnreadableRow):
        return Row(number, str(number), error=f"row {number}: {content.reason}")
    if not isinstance(content, Mapping):
        return Row(number, str(number), error=f"row {number} is not an object with a prompt")
    given = {name: value for name, value in content.items() if name in FIELDS and value is not None and value != ""}
    carried = {name: value for name, value in content.items() if name not in OWN_COLUMNS}
    own_id = content.get("id")
    row_id = str(number) if own_id is None or str(own_id).strip() == "" else str(own_id).strip()
    for name in carried:
        if problem := describe_misspelling(name):
            return Row(number, row_id, carried=carried, error=f"row {number}: {problem}")
    tolerance = given.get("safety_tolerance")
    if isinstance(tolerance, int) and not isinstance(tolerance, bool):
        given["safety_tolerance"] = str(tolerance)  # the service takes a string; tables usually hold a number
    try:
        request = ImageRequest.model_validate(given)
    except ValidationError as error:
        return Row(number, row_id, carried=carried, error=f"row {number}: {explain_invalid(error)}")
    return Row(number, row_id, request, carried)


def explain_invalid(error: ValidationError) -> str:
    """List each invalid field with its value and the problem, in one line."""
    problems = []
    for detail in error.errors(include_url=False):
        column = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "missing":
            problems.append(f"{column} is missing")
            continue
        shown = repr(detail["input"])
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"  # noqa: PLR2004 - fits a line
        problems.append(f"{column} is {shown}: {detail['msg']}")
    return "; ".join(problems)


def _check_ids(rows: Iterable[Row]) -> Iterator[Row]:
    seen: dict[str, int] = {}
    for row in rows:
        first = seen.setdefault(row.id, row.number)
        if first != row.number and row.error is None:
            problem = f"row {row.number}: id {row.id!r} is already the id of row {first}: ids must differ"
            yield Row(row.number, row.id, carried=row.carried, error=problem)
        else:
            yield row
