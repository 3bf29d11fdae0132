"""Names of batch runs that say what ran: `nightly-products.csv · 214 images`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from flux_prefect.manifest.plan import Plan

__all__ = ["initial_run_name", "name_source", "planned_run_name", "rename_run"]


def name_source(source: str | Sequence[Any]) -> str:
    """The table's name for people. Of an address the last part alone: a signed one holds a secret."""
    if not isinstance(source, str):
        return f"{len(source)} requests"
    parts = urlsplit(source)
    return (parts.path if parts.netloc else source).rstrip("/").rpartition("/")[2]


def initial_run_name(source: str | Sequence[Any]) -> str:
    """The run's name while nothing is known but its table."""
    return f"publish {name_source(source)}"


def planned_run_name(source: str | Sequence[Any], plan: Plan) -> str:
    """The run's name once it is known how many images it makes, or publishes of those paid for before."""
    images = plan.images + plan.paid
    told = "nothing new" if images == 0 else f"{images:,} image{'' if images == 1 else 's'}"
    return f"{name_source(source)} · {told}"


async def rename_run(name: str, *, instead_of: str) -> None:
    """Give the enclosing flow run a name in the place of the one it got at its start; a name of anybody else stays.

    A server that can't be asked leaves it as it is. Costs two calls of the server.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    with suppress(httpx.HTTPError, PrefectException):
        async with get_client() as client:
            if (await client.read_flow_run(context.flow_run.id)).name == instead_of:
                await client.update_flow_run(context.flow_run.id, name=name)
                context.flow_run.name = name  # what the records beside the images call it
