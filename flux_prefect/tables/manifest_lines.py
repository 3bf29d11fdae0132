"""The lines of a manifest, and how a file of them is read, also one that a kill has torn.

A line is a JSON object that carries `"manifest": 1`. The order of lines in a file that is being written is the order
of the rows' ends; readers put them in the table's order.
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
"""The form of the records, in each of them under `manifest`."""

_REQUIRED = {"row": int, "id": str, "status": str, "carried": dict}


def is_record(content: Any) -> TypeIs[Mapping[str, Any]]:
    """Whether a value is a record of a manifest."""
    return (
        isinstance(content, Mapping)
        and type(content.get("manifest")) is int
        and "request" in content
        and all(isinstance(content.get(name), kind) for name, kind in _REQUIRED.items())
    )


def is_manifest(file: BinaryIO) -> bool:
    """Whether a file is a manifest, by its first line that is not blank."""
    line = next((line for line in file if line.strip()), b"")
    return is_record(_load(line))


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a manifest's file, in the table's order; of a row that was recorded again, the last.

    A run that was killed leaves a readable file: a last line that was torn is passed over.

    Raises:
        TableError: the file is missing, no manifest, or broken before its last line.
    """
    with local_source(path).open() as file:
        yield from read_records(file, str(path))


def read_records(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """The records of a manifest in the table's order; of a row that was recorded again, the last.

    A last line that was torn is passed over. Costs two readings, and about 100 bytes of memory a row.

    Raises:
        TableError: a line before the last is broken, one is no record, or the records are of several runs.
    """
    for line in ordered_lines(file, name):
        yield json.loads(line)


def ordered_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines that `read_records` reads, as they stand in the file, each with its line break."""
    for place in _offsets(file, name):
        file.seek(place)
        yield file.readline().rstrip() + b"\n"


def repair_last_line(path: Path) -> None:
    """Make a file that a kill or a power cut tore ready to be written on: cut off what is torn of its last line."""
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
    places: dict[int, int] = {}
    runs: set[Any] = set()
    torn: int | None = None
    end = 0
    for number, line in enumerate(file, start=1):
        place, end = end, end + len(line)
        if not line.strip():
            continue
        if torn is not None:
            raise TableError(f"{name}, line {torn} is broken: remove it, or give a whole copy of the manifest.")
        record = _load(line)
        if record is _BROKEN:
            torn = number
        elif is_record(record):
            places[record["row"]] = place
            runs.add(record.get("run"))
        else:
            raise TableError(f"{name}, line {number} is no record of a manifest: give a manifest, or a plain table.")
        if len(runs) > 1:
            raise TableError(f"{name}, line {number}: the manifest of another run begins. Give each run's by itself.")
    return [places[row] for row in sorted(places)]


_BROKEN = object()


def _load(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _BROKEN
