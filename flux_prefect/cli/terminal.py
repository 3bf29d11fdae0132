"""Run a flow for a terminal: its settings are checked, its log is quiet, Ctrl-C has a status of its own."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.client.schemas.objects import State
from prefect.logging.configuration import setup_logging

from flux_prefect.cli.exit_status import INTERRUPTED, MISUSED
from flux_prefect.errors import InvalidSettings
from flux_prefect.settings import current_settings

__all__ = ["refuse_bad_settings", "run_to_state"]


def refuse_bad_settings() -> None:
    """End a command line whose `FLUX_PREFECT_` variables can't be used, with the reason, before anything is done.

    Raises:
        SystemExit: with the status 2.
    """
    try:
        current_settings()
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        raise SystemExit(MISUSED) from None


def run_to_state(run: Callable[[], Any]) -> State[Any]:
    """Call a flow with `return_state=True` and wait for its state.

    The terminal gets warnings and, unless a progress bar is there, the log of the flow run. The server keeps the logs
    of all task runs too.

    Raises:
        SystemExit: with the status 130 after Ctrl-C, 2 for settings that can't be used.
    """
    refuse_bad_settings()

    async def wait() -> State[Any]:
        state: State[Any] = await run()
        return state

    try:
        with _quiet_terminal():
            return asyncio.run(wait())
    except KeyboardInterrupt:
        print("Stopped. What was paid for is kept: the same command continues from there.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def _quiet_terminal() -> Iterator[None]:
    setup_logging()
    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(_worth_a_line)
    try:
        yield
    finally:  # the process may be a notebook, or another program that goes on
        for handler in handlers:
            handler.removeFilter(_worth_a_line)


def _worth_a_line(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING:
        return True
    return record.name == "prefect.flow_runs" and not sys.stderr.isatty()
