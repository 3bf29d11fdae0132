"""The image service's stand-in: generations, result files, billing, logs and models, as an ASGI application."""

from __future__ import annotations

import hmac
import random
import re
import secrets
import time
import uuid
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Literal

import anyio
import anyio.to_thread
from pydantic import AwareDatetime, BaseModel, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from flux_prefect.api.models import CREDITS_PER_USD, FILE_EXTENSIONS, GENERATIONS_PATH, MAX_SEED
from flux_prefect.api.registry import MODELS
from flux_prefect.sandbox import answers
from flux_prefect.sandbox.faults import Delivery, FinishedCall, PendingCall, Strike
from flux_prefect.sandbox.ledger import Entry, LogPage
from flux_prefect.sandbox.painting.painter import paint, paint_black
from flux_prefect.sandbox.painting.prebuilt import stamp
from flux_prefect.sandbox.references import BadReference, fetch_reference, measure_reference
from flux_prefect.sandbox.schema import GenerationBody, IncomingBody, Reference, explain
from flux_prefect.sandbox.state import State
from flux_prefect.sandbox.steering import steering_routes

__all__ = ["create_app"]

_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FILE_NAME = re.compile(r"(?P<token>[0-9a-f]{32})-(?P<index>[0-3])\.(?P<extension>jpg|png|webp)")
_LOG_CALLS_PER_MINUTE = 200
_LOG_DAYS = 92


def create_app(state: State) -> Starlette:
    """The application. Connection faults need the server's protocol to be `wire.TransportProtocol`."""
    service = _ImageService(state)
    return Starlette(
        routes=[
            Route(GENERATIONS_PATH, service.generate, methods=["POST"]),
            Route("/files/loop/{name}", service.redirect_to_itself),
            Route("/files/{name}", service.deliver),
            Route("/v2/billing", service.billing),
            Route("/v1/billing/balance", service.balance),
            Route("/v2/logs", service.logs),
            Route("/v1/models", service.models),
            Route("/v1/models/deprecations", service.deprecations),
            *steering_routes(state),
        ],
        exception_handlers={HTTPException: service.explain_http_error},
    )


class _LogQuery(BaseModel):
    """What can be asked of the log: a period, or a start and an end."""

    period: Annotated[str, Field(pattern=r"^\d{1,4}[mhd]$")] | None = None
    start: AwareDatetime | None = None
    end: AwareDatetime | None = None
    model: str | None = None
    status: Literal["succeeded", "failed"] | None = None
    limit: int = Field(default=50, ge=1, le=100)
    offset: int = Field(default=0, ge=0, le=10**12)

    @model_validator(mode="after")
    def _one_window(self) -> _LogQuery:
        if (self.period is None) == (self.start is None) or (self.start is None) != (self.end is None):
            raise ValueError("give either period, or start and end")
        start, end = self.window()
        if end - start > _LOG_DAYS * 86_400:
            raise ValueError(f"a window has at most {_LOG_DAYS} days")
        return self

    def window(self) -> tuple[float, float]:
        """From when to when, as seconds since 1970."""
        if self.start is not None and self.end is not None:
            return self.start.timestamp(), self.end.timestamp()
        period = self.period or "1d"
        unit = {"m": "minutes", "h": "hours", "d": "days"}[period[-1]]
        end = time.time() + 1
        return end - timedelta(**{unit: int(period[:-1])}).total_seconds(), end


class _ImageService:
    """The endpoints, over one state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._painters = anyio.CapacityLimiter(2)

    # -------------------------------------------------------------- generations

    async def generate(self, request: Request) -> ASGIApp:
        """POST /v1/images/generations."""
        wanted = request.headers.get("x-client-request-id", "")
        call = _Call(
            path=request.url.path,
            # The service drops an id that it can't take without a word, and bills the call.
            client_request_id=wanted if _CLIENT_REQUEST_ID.fullmatch(wanted) else None,
            inference_id=str(uuid.uuid4()),
        )
        if not self._has_key(request):
            return self._refuse(call, 401, "Invalid or missing API key. Send it as Authorization: Bearer <key>.")
        try:
            incoming = IncomingBody.model_validate_json(await request.body())
        except ValidationError as error:
            return self._refuse(call, 400, f"Invalid payload provided: {explain(error)}")
        try:
            references = [await self._take_reference(uri) for uri in incoming.uris]
        except BadReference as error:
            return self._refuse(call, 400, f"Invalid payload provided: the reference image {error}.")
        body = incoming.with_references(references)
        if body.seed is None:
            body = body.model_copy(update={"seed": secrets.randbelow(MAX_SEED) + 1})
        call.body, state = body, self._state
        if state.in_flight.full(state.settings.max_in_flight):
            return self._refuse(call, 429, "Too many concurrent requests.")
        if not state.generation_rate.admit(state.settings.rate_limit_per_minute):
            return self._refuse(call, 429, "Rate limit exceeded.")
        with state.in_flight.one():
            return await self._work(call, body, str(request.base_url))

    async def _work(self, call: _Call, body: GenerationBody, base_url: str) -> ASGIApp:
        # One call, one set of rules, even if they are changed while it waits.
        state, settings = self._state, self._state.settings
        if any(listed.id == body.model and listed.status == "withdrawn" for listed in settings.deprecations):
            return self._refuse(call, 404, "Model not found.")
        cost = answers.Cost(settings.price_of(body.model) * body.images)
        if state.ledger.balance < cost.credits:
            return self._refuse(call, 403, answers.OUT_OF_CREDITS)
        strike = state.faults.take(body.prompt, "before_work", "after_work")
        if strike is not None and not strike.kind.billed:
            return self._strike_unbilled(call, strike)

        await anyio.sleep(settings.latency + random.uniform(0, settings.latency_jitter))  # noqa: S311 - no secret
        black = strike is not None and strike.kind.black
        look = "black" if black else f"fast {settings.fast_bytes}" if settings.fast else "drawn"
        token = secrets.token_hex(16)
        images = [
            answers.Image(
                url=f"{base_url}files/{token}-{index}.{FILE_EXTENSIONS[body.format]}",
                content=await self._image(body, index, look) if answers.needs_bytes(settings.response_shape) else None,
                flagged=False,
            )
            for index in range(body.images)
        ]
        content = answers.generation(body, images, cost, settings.response_shape)
        headers = call.headers() | {
            "x-aimlapi-credits-used": str(cost.credits),
            "x-aimlapi-usd-spent": str(cost.usd),
        }
        answer: ASGIApp
        if strike is None:
            answer = Response(answers.json_bytes(content), media_type="application/json", headers=headers)
        else:
            answer = strike.on(FinishedCall(call.path, settings.envelope, content, headers))
        # Billed before the first byte leaves: an answer that is lost on its way has been paid for.
        charged = state.ledger.record(
            call.entry(
                status=_status(answer),
                fault=strike and strike.kind.name,
                images=body.images,
                credits=cost.credits,
                look=look,
                file_token=token,
                expires_at=time.time() + settings.url_ttl,
            )
        )
        return answer if charged else self._refuse(call, 403, answers.OUT_OF_CREDITS)

    async def _take_reference(self, uri: str) -> Reference:
        content = await fetch_reference(uri)
        reference = await anyio.to_thread.run_sync(measure_reference, content)
        self._state.ledger.keep_reference(reference.sha256, content)
        return reference

    def _strike_unbilled(self, call: _Call, strike: Strike) -> ASGIApp:
        answer = strike.on(PendingCall(call.path, self._state.settings.envelope))
        if isinstance(answer, Response):
            answer.headers.update(call.headers())
        self._state.ledger.record(call.entry(status=_status(answer), fault=strike.kind.name))
        return answer

    def _refuse(self, call: _Call, status: int, message: str) -> Response:
        settings, headers = self._state.settings, call.headers()
        if status == 429 and settings.retry_after is not None:  # noqa: PLR2004 - too many requests
            headers["retry-after"] = f"{settings.retry_after:g}"
        self._state.ledger.record(call.entry(status=status))
        return answers.error(status, message, path=call.path, envelope=settings.envelope, headers=headers)

    # -------------------------------------------------------------- result files

    async def deliver(self, request: Request) -> ASGIApp:
        """GET a result URL."""
        state, settings = self._state, self._state.settings
        state.ledger.count_download()
        pending = PendingCall(request.url.path, settings.envelope)
        gone = pending.error(404, "The requested file does not exist.")
        name = request.path_params["name"]
        parts = _FILE_NAME.fullmatch(name)
        stored = state.ledger.images(parts["token"]) if parts else None
        if parts is None or stored is None or stored.expires_at <= time.time():
            return gone
        body, index = GenerationBody.model_validate_json(stored.request), int(parts["index"])
        if index >= body.images or parts["extension"] != FILE_EXTENSIONS[body.format]:
            return gone
        content = await self._image(body, index, stored.look)
        strike = state.faults.take(body.prompt, "download")
        delivery = Delivery(body, content, name, pending)
        if strike is None:
            return delivery.file(content)
        return await anyio.to_thread.run_sync(strike.on, delivery)

    async def redirect_to_itself(self, request: Request) -> Response:
        """GET the place that `redirect_loop` leads to."""
        return RedirectResponse(request.url.path, status_code=302)

    async def _image(self, body: GenerationBody, index: int, look: str) -> bytes:
        if look == "drawn":
            references = [self._state.ledger.reference(reference.sha256) for reference in body.references]
            return await anyio.to_thread.run_sync(paint, body, index, references, limiter=self._painters)
        if look == "black":
            return await anyio.to_thread.run_sync(paint_black, body, limiter=self._painters)
        return stamp(body, index, int(look.removeprefix("fast ")))

    # -------------------------------------------------------------- the account

    async def billing(self, request: Request) -> Response:
        """GET /v2/billing: the balance in US dollars."""
        self._demand_key(request)
        return JSONResponse({"current_balance": self._state.ledger.balance / CREDITS_PER_USD, "currency": "USD"})

    async def balance(self, request: Request) -> Response:
        """GET /v1/billing/balance: the balance in credits."""
        self._demand_key(request)
        balance, threshold = self._state.ledger.balance, 10_000
        return JSONResponse(
            {
                "balance": balance,
                "lowBalance": balance < threshold,
                "lowBalanceThreshold": threshold,
                "lastUpdated": answers.utc_now(),
                "autoDebitStatus": "disabled",
                "status": "current",
                "statusExplanation": "Balance is current and up to date",
            }
        )

    async def logs(self, request: Request) -> Response:
        """GET /v2/logs: what was called and what it cost, the newest first."""
        self._demand_key(request)
        if not self._state.log_rate.admit(_LOG_CALLS_PER_MINUTE):
            raise HTTPException(429, f"The log can be read {_LOG_CALLS_PER_MINUTE} times a minute.")
        try:
            query = _LogQuery.model_validate(dict(request.query_params))
        except ValidationError as error:
            raise HTTPException(400, f"Invalid query: {explain(error)}") from error
        start, end = query.window()
        page = LogPage(
            start=start,
            end=end,
            model=query.model,
            succeeded=None if query.status is None else query.status == "succeeded",
            limit=query.limit,
            offset=query.offset,
        )
        rows, total = self._state.ledger.log(page)
        more = query.offset + len(rows) < total
        pagination = {"limit": query.limit, "offset": query.offset, "total": total, "has_more": more}
        return JSONResponse({"data": [_log_row(row) for row in rows], "pagination": pagination})

    async def models(self, request: Request) -> Response:
        """GET /v1/models. Needs no key, as at the service."""
        wanted = request.query_params.get("id")
        with_pricing = "pricing" in request.query_params.getlist("include")
        models: list[dict[str, Any]] = [
            {"id": model, "type": "image", "endpoints": [GENERATIONS_PATH]}
            for model in MODELS
            if wanted in {None, model}
        ]
        for model in models if with_pricing else ():
            price = self._state.settings.price_of(model["id"])
            model["pricing"] = {"unit": "image", "credits": price, "usd": price / CREDITS_PER_USD}
        return JSONResponse({"object": "list", "data": models})

    async def deprecations(self, _: Request) -> Response:
        """GET /v1/models/deprecations. Needs no key, as at the service."""
        listed = [deprecated.model_dump() for deprecated in self._state.settings.deprecations]
        return JSONResponse({"object": "list", "data": listed})

    # -------------------------------------------------------------- keys and errors

    def _has_key(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(key.strip().encode("utf-8"), self._state.api_key.encode("utf-8"))
        return scheme.lower() == "bearer" and same

    def _demand_key(self, request: Request) -> None:
        if not self._has_key(request):
            raise HTTPException(401, "Invalid or missing API key. Send it as Authorization: Bearer <key>.")

    async def explain_http_error(self, request: Request, error: Exception) -> Response:
        """Any other refusal, in the envelope that is set."""
        if not isinstance(error, HTTPException):
            raise error
        return answers.error(
            error.status_code,
            str(error.detail),
            path=request.url.path,
            envelope=self._state.settings.envelope,
            headers=error.headers,
        )


class _Call:
    """One generation on its way, and how it goes into the ledger."""

    def __init__(self, *, path: str, client_request_id: str | None, inference_id: str) -> None:
        self.path = path
        self.client_request_id = client_request_id
        self.inference_id = inference_id
        self.body: GenerationBody | None = None

    def headers(self) -> dict[str, str]:
        """The ids by which a call can be found again."""
        headers = {"x-inference-id": self.inference_id}
        if self.client_request_id is not None:
            headers["x-client-request-id"] = self.client_request_id
        return headers

    def entry(self, **facts: Any) -> Entry:
        """The ledger's entry, with what came of the call."""
        return Entry(
            inference_id=self.inference_id,
            client_request_id=self.client_request_id,
            request=self.body.model_dump_json(exclude_none=True) if self.body else None,
            **facts,
        )


def _status(answer: ASGIApp) -> int | None:
    status: int | None = getattr(answer, "status_code", None)
    return status


def _log_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "inference_id": row["inference_id"],
        "client_request_id": row["client_request_id"],
        "model": row["model"],
        "status": "succeeded" if row["succeeded"] else "failed",
        "cost": {"usd": row["credits"] / CREDITS_PER_USD, "credits": row["credits"]},
        "created": datetime.fromtimestamp(row["at"], timezone.utc).isoformat(),
    }
