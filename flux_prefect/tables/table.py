"""Prompt tables: where the requests of a batch come from.

A row has the fields of `ImageRequest` and an `id`; all other columns are carried through to the report untouched.
The manifest of an earlier run is a table as well: its rows come again with the seeds that they had.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import TableError
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
"""Which rows of a manifest to take: those that ended so, or `unpublished`, which is failed and skipped_budget.

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
    """One row: a request, or the reason why it is none.

    Attributes:
        number: its place among the data rows, from 1. A manifest's rows keep those of their table.
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


class Table:
    """A table on this machine, to be read any number of times.

    Args:
        content: a fetched or local source, or the requests or rows themselves.
        only: take these rows of a manifest alone.
    """

    def __init__(self, content: Source | InlineRows, only: Only | None = None) -> None:
        self._content = content
        self._only = only

    def rows(self) -> Iterator[Row]:
        """Every row from the first, read as it is asked for.

        A bad row becomes a `Row` with an error; the rows after it are read all the same. An empty cell means the
        field's default. A second row with the same id is invalid. Memory: the ids, about 150 bytes a row.

        Raises:
            TableError: the file is missing, not text, broken as a whole, or lacks the column `prompt`; or `only` is
                given and it is no manifest. Some of that is known only at a later row.
        """
        return _check_ids(self._parse_all())

    def _parse_all(self) -> Iterator[Row]:
        for number, content in self._read():
            if is_record(content):
                if self._only is None or content["status"] in _STATUSES[self._only]:
                    yield _revive(content)
            elif self._only is None:
                yield _parse(number, content)
            else:
                raise TableError(f"only={self._only!r} takes rows of an earlier run's manifest, and this is none.")

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
    """A table from anywhere: what is elsewhere is fetched once, then read row by row any number of times.

    Args:
        source: a path, `s3://bucket/key` or `https://` address that ends in .csv, .jsonl, .ndjson or .parquet, or a
            list of requests or rows.
        only: take these rows of a manifest alone.
        bucket: its keys and endpoint are used for a source in the same bucket.

    Raises:
        TableError: the source can't be fetched, or its suffix is another.

    Example:
        ```python
        async with open_table("s3://team/prompts.csv") as table:
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

    A file is opened when its first row is asked for. See `Table.rows`; addresses are for `open_table`.

    Raises:
        TableError: as `Table.rows`; at once where the suffix is none that can be read.
    """
    return Table(local_source(source) if isinstance(source, (str, Path)) else source, only).rows()


def _read_inline(contents: InlineRows) -> Iterator[tuple[int, Any]]:
    for number, content in enumerate(contents, start=1):
        given = dict(content) if isinstance(content, Mapping) else content
        problem = None if isinstance(given, ImageRequest) else describe_unstorable(given)
        yield number, given if problem is None else UnreadableRow(f"it {problem}")


def _revive(record: Mapping[str, Any]) -> Row:
    """The row that a record of a manifest was written for."""
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
