"""How a batch shows its progress: a bar for a person at a terminal, plain lines for everybody else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flux_prefect.batch.report import ItemRecord
from flux_prefect.budget import describe_credits

_SECONDS_BETWEEN_LINES = 10.0

Logger: TypeAlias = "logging.Logger | logging.LoggerAdapter[logging.Logger]"  # text, as Python 3.10 can't index it


@contextmanager
def show_progress(total: int, logger: Logger) -> Iterator[Callable[[ItemRecord], None]]:
    """Show the progress of `total` items; yields what to call with every record.

    Items that failed are logged at once with their reason, in both forms.
    """
    if sys.stderr.isatty():
        with _bar(total, logger) as tell:
            yield tell
    else:
        yield _lines(total, logger)


@contextmanager
def _bar(total: int, logger: Logger) -> Iterator[Callable[[ItemRecord], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[spent]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("publishing", total=total, spent="")
        spent = 0.0

        def tell(record: ItemRecord) -> None:
            nonlocal spent
            spent += record.credits_used
            progress.update(bar, advance=1, spent=describe_credits(spent))
            _log_failure(record, logger)

        yield tell


def _lines(total: int, logger: Logger) -> Callable[[ItemRecord], None]:
    done, spent, last = 0, 0.0, time.monotonic()

    def tell(record: ItemRecord) -> None:
        nonlocal done, spent, last
        done += 1
        spent += record.credits_used
        _log_failure(record, logger)
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES or done == total:
            last = time.monotonic()
            logger.info("%d of %d done, %s so far", done, total, describe_credits(spent))

    return tell


def _log_failure(record: ItemRecord, logger: Logger) -> None:
    if record.status in {"failed", "flagged", "invalid"}:
        logger.warning("%s %s: %s: %s", record.id, record.status, record.error, record.message)
