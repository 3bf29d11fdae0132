"""The control endpoints: settings, faults and the ledger over HTTP. No key: the sandbox listens on loopback."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from flux_prefect.sandbox.faults import FAULTS, ArmedFault, UnknownFault
from flux_prefect.sandbox.ledger import LedgerReport
from flux_prefect.sandbox.schema import explain
from flux_prefect.sandbox.state import State

__all__ = ["steering_routes"]


def steering_routes(state: State) -> list[BaseRoute]:
    """The routes under /sandbox."""
    steering = _Steering(state)
    return [
        Route("/sandbox/settings", steering.show_settings, methods=["GET"]),
        Route("/sandbox/settings", steering.change_settings, methods=["PATCH"]),
        Route("/sandbox/faults", steering.show_faults, methods=["GET"]),
        Route("/sandbox/faults", steering.arm_fault, methods=["POST"]),
        Route("/sandbox/faults", steering.clear_faults, methods=["DELETE"]),
        Route("/sandbox/faults/names", steering.fault_names),
        Route("/sandbox/ledger", steering.show_ledger),
        Route("/sandbox/reset", steering.reset, methods=["POST"]),
    ]


class _Steering:
    def __init__(self, state: State) -> None:
        self._state = state

    async def show_settings(self, _: Request) -> Response:
        return JSONResponse(self._state.all_settings.model_dump())

    async def change_settings(self, request: Request) -> Response:
        try:
            settings = self._state.change(await _object(request))
        except ValidationError as error:
            raise HTTPException(400, explain(error)) from error
        return JSONResponse(settings.model_dump())

    async def show_faults(self, _: Request) -> Response:
        return JSONResponse([fault.model_dump() for fault in self._state.faults.all()])

    async def arm_fault(self, request: Request) -> Response:
        try:
            armed = self._state.faults.arm(ArmedFault.model_validate(await _object(request)))
        except ValidationError as error:
            raise HTTPException(400, explain(error)) from error
        except UnknownFault as error:
            raise HTTPException(400, str(error)) from error
        return JSONResponse(armed.model_dump(), 201)

    async def clear_faults(self, _: Request) -> Response:
        self._state.faults.clear()
        return Response(status_code=204)

    async def fault_names(self, _: Request) -> Response:
        return JSONResponse({fault.name: fault.summary for fault in FAULTS.values()})

    async def show_ledger(self, request: Request) -> Response:
        short = request.query_params.get("summary") == "true"
        rows = [] if short else self._state.ledger.calls()
        report = LedgerReport(totals=self._state.summary(), rows=rows)
        return Response(report.model_dump_json(), media_type="application/json")

    async def reset(self, _: Request) -> Response:
        self._state.reset()
        return Response(status_code=204)


async def _object(request: Request) -> dict[str, Any]:
    try:
        content = await request.json()
    except ValueError as error:
        raise HTTPException(400, "The body is no JSON.") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "The body must be a JSON object.")
    return content
