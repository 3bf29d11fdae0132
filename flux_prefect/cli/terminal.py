"""What the flows' command lines share."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.client.schemas.objects import State
from prefect.logging.configuration import setup_logging

from flux_prefect.cli.exit_status import FAILED, INTERRUPTED, MISUSED
from flux_prefect.errors import InvalidSettings
from flux_prefect.settings import current_settings

__all__ = ["FAILED", "INTERRUPTED", "MISUSED", "add_connection_arguments", "refuse_bad_settings", "run_to_state"]


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to publish to, and by which account."""
    parser.add_argument("--bucket", required=True, help="s3://name/prefix, or the name of a saved Image Bucket block")
    parser.add_argument(
        "--credentials",
        metavar="NAME",
        help="name of a saved AIMLAPI Credentials block (default: AIMLAPI_KEY and AIMLAPI_BASE_URL)",
    )


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


def run_to_state(run: Awaitable[State[Any]]) -> State[Any]:
    """Run a flow that was called with `return_state=True`.

    The terminal gets warnings and, unless a progress bar is there, the log of the flow run. The server keeps the logs
    of all task runs too.
    """
    try:
        refuse_bad_settings()
    except SystemExit:
        if isinstance(run, Coroutine):
            run.close()  # nobody will await it
        raise

    async def wait() -> State[Any]:
        return await run

    try:
        with _quiet_terminal():
            return asyncio.run(wait())
    except KeyboardInterrupt:
        print("Stopped. What was paid for is kept: the same command goes on from there.", file=sys.stderr)
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
