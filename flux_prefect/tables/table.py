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
from flux_prefect.tables.cells import is_nothing, read_fields, read_id, read_seed_id
from flux_prefect.tables.columns import OWN_COLUMNS, Columns
from flux_prefect.tables.formats import UnreadableRow, describe_unstorable
from flux_prefect.tables.manifest_lines import is_manifest, is_record, read_records
from flux_prefect.tables.reading import Reading
from flux_prefect.tables.rows import read_rows
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
        seed_id: what the row's seed is drawn from where that is not its id: an id written as "1.0".
    """

    number: int
    id: str
    request: ImageRequest | None = None
    carried: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    seed_id: str | None = field(default=None, compare=False, repr=False)


class Table:
    """A table on this machine. It can be read any number of times.

    Args:
        content: a fetched or local source, or the requests or rows themselves.
        only: read only these rows of a manifest.
        columns: the column of a field, or of `id`, by the field's name. Others are found by their own names.

    Raises:
        TableError: `columns` has a key that is not a field, or one column for two fields.
    """

    def __init__(
        self, content: Source | InlineRows, only: Only | None = None, columns: Mapping[str, str] | None = None
    ) -> None:
        self._content = content
        self._only = only
        self._columns = Columns(columns)

    def rows(self, reading: Reading | None = None) -> Iterator[Row]:
        """Read all rows from the first, one at a time.

        An invalid row becomes a `Row` with an error; the rows after it are read as usual. An empty cell stands for the
        field's default. A row of which every cell is empty is none, but counts for the numbers of the rows after it. A
        second row with the same id is invalid. Memory: the ids, about 150 bytes a row.

        Args:
            reading: from `new_reading`; it gets what is found on the way.

        Raises:
            TableError: the file is missing, not text, broken as a whole, or lacks the column `prompt`; or `only` is
                set and the table is not a manifest. Some of these are found only at a later row.
        """
        return _check_ids(self._parse_all(reading or self.new_reading()))

    def new_reading(self) -> Reading:
        """Make the record of one reading of this table."""
        return Reading(self._columns)

    def check_rows(self, least: int) -> None:
        """Verify that the table has at least `least` rows, valid or not. Rows that `only` leaves out count.

        Raises:
            TooFewRows: it has fewer.
            TableError: as for `rows`.
        """
        found = sum(1 for _ in itertools.islice(self._read(self.new_reading()), least))
        if found < least:
            name = self._content.name if isinstance(self._content, Source) else "the list"
            raise TooFewRows(
                f"source {name!r} has {found:,} rows and min_rows is {least:,}: correct what writes the table, or set "
                "min_rows to the number of rows that it may have. Nothing was sent."
            )

    def _parse_all(self, reading: Reading) -> Iterator[Row]:
        for number, content in self._read(reading):
            if is_record(content):
                if self._only is None or content["status"] in _STATUSES[self._only]:
                    yield _restore(content)
            elif self._only is None:
                yield _parse(number, content, reading)
            else:
                raise TableError(f"only={self._only!r} needs the manifest of an earlier run, and this is not one.")

    def _read(self, reading: Reading) -> Iterator[tuple[int, Any]]:
        if not isinstance(self._content, Source):
            yield from _read_inline(self._content)
            return
        for part in self._content.parts:
            if part.format == "jsonl":
                with part.open() as file:
                    if is_manifest(file):
                        raise TableError(f"{part.name} is a manifest: read it alone, not with others.")
        if self._content.format == "jsonl" and not self._content.parts:
            with self._content.open() as file:
                if is_manifest(file):
                    file.seek(0)
                    yield from enumerate(read_records(file, self._content.name), start=1)
                    return
        yield from read_rows(self._content, reading)


@asynccontextmanager
async def open_table(
    source: str | Path | InlineRows,
    *,
    only: Only | None = None,
    columns: Mapping[str, str] | None = None,
    bucket: ImageBucket | None = None,
) -> AsyncIterator[Table]:
    """Open a table from any source. A remote table is fetched once, then read row by row any number of times.

    Args:
        source: as for `open_source`, or a list of requests or rows.
        only: read only these rows of a manifest.
        columns: the column of a field, or of `id`, by the field's name, as in `{"prompt": "Beschreibung"}`.
        bucket: its keys and endpoint are used for a source in the same bucket.

    Raises:
        TableError: the source can't be fetched, its format is unknown, or `columns` is wrong.

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
            yield Table(fetched, only, columns)
    else:
        yield Table(source, only, columns)


def read_table(
    source: str | Path | InlineRows, *, only: Only | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[Row]:
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
    return Table(local_source(source) if isinstance(source, (str, Path)) else source, only, columns).rows()


def _read_inline(contents: InlineRows) -> Iterator[tuple[int, Any]]:
    for number, content in enumerate(contents, start=1):
        given = _without_nan(content) if isinstance(content, Mapping) else content
        problem = None if isinstance(given, ImageRequest) else describe_unstorable(given)
        yield number, given if problem is None else UnreadableRow(f"it {problem}")


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with None in the place of NaN, which pandas has for an empty cell."""
    return {name: None if isinstance(value, float) and is_nothing(value) else value for name, value in row.items()}


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


def _parse(number: int, content: Any, reading: Reading) -> Row:
    if isinstance(content, ImageRequest):
        return Row(number, str(number), content)
    if isinstance(content, UnreadableRow):
        return Row(number, str(number), error=f"row {number}: {content.reason}")
    if not isinstance(content, Mapping):
        return Row(number, str(number), error=f"row {number} is not an object with a prompt")
    try:
        named = reading.apply(content)
    except ValueError as error:
        return Row(number, str(number), carried=dict(content), error=f"row {number}: {error}")
    carried = {name: value for name, value in named.items() if name not in OWN_COLUMNS}
    row_id = read_id(named.get("id")) or str(number)
    try:
        request = ImageRequest.model_validate(read_fields(named))
    except ValidationError as error:
        return Row(number, row_id, carried=carried, error=f"row {number}: {explain_invalid(error)}")
    return Row(number, row_id, request, carried, seed_id=read_seed_id(named.get("id")) or None)


_REMEDIES = {
    "int_parsing": ". Write digits alone, such as 100000: no separators, no exponent",
    "int_from_float": ". Write a whole number",
    "float_parsing": ". Write it with a point, such as 3.5",
}


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
        problems.append(f"{column} is {shown}: {detail['msg']}{_REMEDIES.get(detail['type'], '')}")
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
