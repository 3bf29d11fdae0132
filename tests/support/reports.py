"""Reports of batches that never ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport, Tally
from flux_prefect.manifest.writer import record_line


def make_report(items: Sequence[ItemRecord], folder: Path, *, seconds: float = 1.0) -> BatchReport:
    """The report of a batch that ended with these records, which lie in the folder."""
    tally = Tally()
    for item in items:
        tally.add(item)
    records = folder / "records.jsonl"
    records.write_bytes(b"".join(record_line(item, "run-1") for item in items))
    return tally.report(seconds=seconds).model_copy(update={"records": records})
