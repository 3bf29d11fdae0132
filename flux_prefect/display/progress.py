"""Progress of a batch: a bar at a terminal, plain lines in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from flux_prefect.manifest.plan import Plan
from flux_prefect.manifest.records import UNSUCCESSFUL, ItemRecord
from flux_prefect.money.budget import describe_credits

__all__ = ["Logger", "Progress", "describe_seconds", "show_progress"]

_SECONDS_BETWEEN_LINES = 30.0
_MAX_LOGGED_FAILURES = 20

Logger: TypeAlias = (
    "logging.Logger | logging.LoggerAdapter[logging.Logger]"  # a string, as Python 3.10 can't subscript the class
)


class Progress:
    """The progress of a batch, from the records added so far.

    Args:
        total: the number of rows.
        quick: how many rows take no time, because they are unchanged or invalid. They do not count for the pace.
        clock: returns the time in seconds. The batch starts now.

    Attributes:
        total: the number of rows.
        done: the number of rows that have ended.
        images: the number of images that this batch has published.
        spent: the cost as the service reported it, in credits.
    """

    def __init__(self, total: int, *, quick: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = 0
        self.images = 0
        self.spent = 0.0
        self._slow = total - quick
        self._slow_done = 0
        self._clock = clock
        self._started = clock()

    @classmethod
    def of(cls, plan: Plan, *, clock: Callable[[], float] = time.monotonic) -> Progress:
        """Make the progress of a batch that starts now."""
        return cls(plan.rows, quick=plan.published + plan.invalid, clock=clock)

    def add(self, record: ItemRecord) -> None:
        """Count a record."""
        self.done += 1
        self.spent += record.credits_used
        self._slow_done += record.status not in {"unchanged", "invalid"}
        self.images += sum(image.created for image in record.images)

    def set_totals(self, *, done: int, images: int, spent: float) -> None:
        """Replace the sums by those of records that were counted elsewhere."""
        self._slow_done = max(0, done - (self.total - self._slow))
        self.done, self.images, self.spent = done, images, spent

    @property
    def percent(self) -> float:
        """The share of rows that have ended, from 0 to 100."""
        return 100.0 * self.done / self.total if self.total else 100.0

    @property
    def images_a_minute(self) -> float:
        """The average number of images a minute since the start."""
        elapsed = self._clock() - self._started
        return 60.0 * self.images / elapsed if elapsed > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The estimated time for the remaining rows at the pace so far, in seconds; None while there is no pace."""
        if self.done >= self.total:
            return 0.0
        if self._slow_done == 0:
            return None
        return (self._clock() - self._started) / self._slow_done * max(0, self._slow - self._slow_done)

    def pace(self) -> str:
        """Describe the pace and the time left, each where it is known."""
        parts = [f"{self.images_a_minute:,.0f} images a minute"] if self.images else []
        left = self.seconds_left
        if left:
            parts.append(f"{describe_seconds(left)} left")
        return ", ".join(parts)

    def summary(self) -> str:
        """Summarize rows done, credits so far, pace and time left in one line."""
        line = f"{self.done:,} of {self.total:,} done, {describe_credits(self.spent)} so far"
        pace = self.pace()
        return f"{line}, {pace}" if pace and self.done < self.total else line


def describe_seconds(seconds: float) -> str:
    """Format a duration: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:  # noqa: PLR2004 - minutes would be too coarse below it
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004 - an hour


@contextmanager
def show_progress(progress: Progress, logger: Logger) -> Iterator[Callable[[ItemRecord], None]]:
    """Show a batch's progress at the terminal or in the log; yields a function that adds a record to it.

    The first twenty rows without images are also logged at once, each with its error.
    """
    if sys.stderr.isatty():
        with _bar(progress) as show:
            yield _make_recorder(progress, show, logger)
    else:
        yield _make_recorder(progress, _lines(progress, logger), logger)


def _make_recorder(progress: Progress, show: Callable[[], None], logger: Logger) -> Callable[[ItemRecord], None]:
    failures = 0

    def add(record: ItemRecord) -> None:
        nonlocal failures
        progress.add(record)
        if record.status in UNSUCCESSFUL:
            failures += 1
            if failures <= _MAX_LOGGED_FAILURES:
                logger.warning("%s %s: %s: %s", record.id, record.status, record.error, record.message)
            elif failures == _MAX_LOGGED_FAILURES + 1:
                logger.warning("More rows have failed; see the manifest for all of them.")
        show()

    return add


@contextmanager
def _bar(progress: Progress) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[spent]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task("publishing", total=progress.total, spent="", pace="")
        yield lambda: bar.update(
            shown, completed=progress.done, spent=describe_credits(progress.spent), pace=progress.pace()
        )


def _lines(progress: Progress, logger: Logger) -> Callable[[], None]:
    last = time.monotonic()

    def show() -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES or progress.done == progress.total:
            last = time.monotonic()
            logger.info("%s", progress.summary())

    return show
