"""Descriptive names of batch runs: `nightly-products.csv · 214 images`."""

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
    """Make a display name of a table: the last part of its path or address, without the query, which can be secret."""
    if not isinstance(source, str):
        return f"{len(source)} requests"
    parts = urlsplit(source)
    return (parts.path if parts.netloc else source).rstrip("/").rpartition("/")[2]


def initial_run_name(source: str | Sequence[Any]) -> str:
    """Make the run's name from its table alone, before there is a plan."""
    return f"publish {name_source(source)}"


def planned_run_name(source: str | Sequence[Any], plan: Plan) -> str:
    """Make the run's name from its table and the number of images that it generates, or publishes from the spool."""
    images = plan.images + plan.paid
    count = "nothing new" if images == 0 else f"{images:,} image{'' if images == 1 else 's'}"
    return f"{name_source(source)} · {count}"


async def rename_run(name: str, *, instead_of: str) -> None:
    """Rename the enclosing flow run if it still has the name `instead_of`; a name that a user has set is kept.

    Where Prefect's server can't be reached, the name stays as it is. Costs two requests to the server.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    with suppress(httpx.HTTPError, PrefectException):
        async with get_client() as client:
            if (await client.read_flow_run(context.flow_run.id)).name == instead_of:
                await client.update_flow_run(context.flow_run.id, name=name)
                context.flow_run.name = name  # the sidecars of later images use it
