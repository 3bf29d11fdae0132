"""Reading and repairing manifests in JSON Lines, including files whose last line was cut off by a kill.

Each line is a JSON object with `"manifest": 1`. While a run goes on, lines are in the order in which rows end; readers
return them in the table's order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import TypeIs

from flux_prefect.errors import TableError
from flux_prefect.tables.sources import local_source

__all__ = ["VERSION", "is_manifest", "is_record", "ordered_lines", "read_manifest", "read_records", "repair_last_line"]

VERSION = 1
"""The version of the record format, stored in each record under `manifest`."""

_REQUIRED = {"row": int, "id": str, "status": str, "carried": dict}


def is_record(content: Any) -> TypeIs[Mapping[str, Any]]:
    """Check whether a value is a manifest record."""
    return (
        isinstance(content, Mapping)
        and type(content.get("manifest")) is int
        and "request" in content
        and all(isinstance(content.get(name), kind) for name, kind in _REQUIRED.items())
    )


def is_manifest(file: BinaryIO) -> bool:
    """Check whether a file is a manifest, by its first line that is not blank."""
    line = next((line for line in file if line.strip()), b"")
    return is_record(_load(line))


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a manifest file in the table's order; of several records of a row, the last one counts.

    The file of a killed run can be read: an incomplete last line is skipped.

    Raises:
        TableError: the file is missing, is not a manifest, or is broken before its last line.
    """
    with local_source(path).open() as file:
        yield from read_records(file, str(path))


def read_records(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """Read the records of an open manifest in the table's order; of several records of a row, the last one counts.

    An incomplete last line is skipped. Reads the file twice and takes about 100 bytes of memory a row.

    Raises:
        TableError: a line before the last is broken, a line is not a record, or the records belong to several runs.
    """
    for line in ordered_lines(file, name):
        yield json.loads(line)


def ordered_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Read the lines of the records that `read_records` returns, unchanged, each with its line break."""
    for offset in _offsets(file, name):
        file.seek(offset)
        yield file.readline().rstrip() + b"\n"


def repair_last_line(path: Path) -> None:
    """Prepare the file of a killed run for appending: remove its last line where it is incomplete."""
    with path.open("r+b") as file:
        end, last = 0, b"\n"
        for line in file:
            end, last = end + len(line), line
        if last.endswith(b"\n"):
            return
        if is_record(_load(last)):
            file.write(b"\n")
        else:
            file.truncate(end - len(last))


def _offsets(file: BinaryIO, name: str) -> list[int]:
    offsets: dict[int, int] = {}
    runs: set[Any] = set()
    broken: int | None = None
    end = 0
    for number, line in enumerate(file, start=1):
        offset, end = end, end + len(line)
        if not line.strip():
            continue
        if broken is not None:
            raise TableError(f"{name}, line {broken} is broken: remove it, or use a complete copy of the manifest.")
        record = _load(line)
        if record is _BROKEN:
            broken = number
        elif is_record(record):
            offsets[record["row"]] = offset
            runs.add(record.get("run"))
        else:
            raise TableError(f"{name}, line {number} is not a manifest record: use a manifest, or a plain table.")
        if len(runs) > 1:
            raise TableError(f"{name}, line {number}: the manifest of another run begins. Use one file for each run.")
    return [offsets[row] for row in sorted(offsets)]


_BROKEN = object()


def _load(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _BROKEN
