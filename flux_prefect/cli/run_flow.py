"""Run a flow of one's own with the demo's table and bucket: `python -m flux_prefect.cli.run_flow FLOW TABLE BUCKET`."""

from __future__ import annotations

import asyncio
import inspect
import sys
from functools import partial
from typing import Any, cast

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.flows import load_flow_from_entrypoint

from flux_prefect.cli.exit_status import FAILED
from flux_prefect.cli.terminal import run_to_state

__all__ = ["main"]


def main(entrypoint: str, table: str, bucket: str) -> int:
    """Run the flow; the exit status, 0 only if it is Completed."""
    flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint)
    known = {"source": table, "table": table, "bucket": bucket}
    parameters = {name: value for name, value in known.items() if name in inspect.signature(flow.fn).parameters}
    state = run_to_state(lambda: _call(flow, parameters))
    ended = state.name if state.message is None else f"{state.name}: {state.message}"
    print(ended, file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else FAILED


async def _call(flow: Flow[..., Any], parameters: dict[str, Any]) -> State[Any]:
    call = partial(cast("Any", flow), **parameters, return_state=True)
    state: State[Any] = await call() if flow.isasync else await asyncio.to_thread(call)
    return state


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
