"""The Prefect server that a command starts where none is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
    temporary_settings,
)

__all__ = ["NoServer", "temporary_server"]

STARTUP_SECONDS = 180
"""How long a temporary server may take: in a new home its migrations alone take Prefect's own limit, 20 seconds."""

_OWN_SERVER = (
    "To use a server of your own, run `prefect server start` and set PREFECT_API_URL=http://127.0.0.1:4200/api."
)


class NoServer(Exception):
    """There is no Prefect server, and none could be started; the message says what to do."""


@contextmanager
def temporary_server() -> Iterator[None]:
    """Start Prefect's temporary server where PREFECT_API_URL is not set, and say so.

    It stops with this process. It may take 180 seconds, unless PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS is set.

    Raises:
        NoServer: it did not start, or temporary servers are switched off.
    """
    if PREFECT_API_URL.value():
        yield
        return
    if not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        raise NoServer(f"No Prefect server: PREFECT_API_URL is not set. {_OWN_SERVER}")
    given = get_current_settings().server.ephemeral
    is_chosen = "startup_timeout_seconds" in given.model_fields_set
    seconds = given.startup_timeout_seconds if is_chosen else STARTUP_SECONDS
    print(
        "PREFECT_API_URL is not set: starting a temporary Prefect server, which takes up to a minute in a new home. "
        f"{_OWN_SERVER}",
        file=sys.stderr,
        flush=True,
    )
    with temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: seconds}):
        server = SubprocessASGIServer()
        try:
            server.start()
        except (RuntimeError, OSError, httpx.HTTPError) as error:
            server.stop()
            raise NoServer(
                f"The temporary Prefect server did not start within {seconds} s. {_OWN_SERVER} "
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS sets the limit."
            ) from error
        yield
