from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import LogEntry
from flux_prefect.api.pacing import Pacer
from flux_prefect.errors import (
    AnswerLost,
    AuthenticationFailed,
    Billed,
    InvalidResponse,
    NotFound,
    NotSent,
    RateLimited,
    ServerFailed,
    ServiceError,
)
from flux_prefect.sandbox.launching import RunningSandbox

KEY = "sk-test-5f0c1d7e9a"
START = datetime(2026, 7, 2, 3, tzinfo=timezone.utc)
END = START + timedelta(hours=1)

# As the service's own document has it, with its example values.
DOCUMENTED = {
    "created": "2026-07-02T03:04:05.000Z",
    "status": "succeeded",
    "origin": "api",
    "model": "openai/gpt-5",
    "cost": {"usd": 0.25, "credits": 500000},
    "tokens": {"input": 10, "output": 20, "total": 30},
    "request_id": "req-1",
    "inference_id": "inf-1",
    "client_request_id": "customer-42",
}


def make_client(handler: Callable[[httpx.Request], httpx.Response]) -> AimlApiClient:
    """A client with this handler in place of the service."""
    return AimlApiClient(
        api_key=SecretStr(KEY),
        base_url="https://api.example",
        pacer=Pacer(4),
        transport=httpx.MockTransport(handler),
    )


class Log:
    """A log that grows by `growth` rows after each look at it, and keeps what it was asked."""

    def __init__(self, rows: int, growth: int = 0) -> None:
        self.requests: list[httpx.Request] = []
        self._numbers = itertools.count()
        self._growth = growth
        self._rows: list[dict[str, Any]] = []
        self._grow(rows)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """One page."""
        self.requests.append(request)
        limit, offset = (int(request.url.params[name]) for name in ("limit", "offset"))
        page = self._rows[offset : offset + limit]
        self._grow(self._growth)
        return httpx.Response(200, json={"data": page, "pagination": {"limit": limit, "offset": offset}})

    def _grow(self, rows: int) -> None:
        for number in itertools.islice(self._numbers, rows):
            self._rows.insert(0, {**DOCUMENTED, "inference_id": f"inf-{number}"})


def answer(body: Any) -> Callable[[httpx.Request], httpx.Response]:
    """A service that always answers with this body."""
    return lambda _: httpx.Response(200, json=body)


async def read(handler: Callable[[httpx.Request], httpx.Response]) -> list[LogEntry]:
    """All rows, in order."""
    async with make_client(handler) as client:
        return [entry async for page in client.log_pages(START, END) for entry in page]


# What is asked


async def test_the_log_is_asked_for_its_window_and_the_largest_pages() -> None:
    """Both ends in UTC, with the key, and never with a relative period beside them."""
    log = Log(1)
    async with make_client(log) as client:
        here = timezone(timedelta(hours=3))
        pages = [page async for page in client.log_pages(START.astimezone(here), END.astimezone(here))]
    (request,) = log.requests
    assert (request.method, request.url.path) == ("GET", "/v2/logs")
    assert dict(request.url.params) == {
        "start": "2026-07-02T03:00:00Z",
        "end": "2026-07-02T04:00:00Z",
        "limit": "100",
        "offset": "0",
    }
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert [len(page) for page in pages] == [1]


@pytest.mark.parametrize(("rows", "requests"), [(0, 1), (99, 1), (100, 2), (101, 2), (250, 3)])
async def test_pages_are_read_until_one_is_not_full(rows: int, requests: int) -> None:
    """Every row comes once, the newest first."""
    log = Log(rows)
    entries = await read(log)
    assert [entry.inference_id for entry in entries] == [f"inf-{number}" for number in reversed(range(rows))]
    assert [request.url.params["offset"] for request in log.requests] == [str(100 * page) for page in range(requests)]


async def test_a_log_that_grows_meanwhile_repeats_no_row_and_skips_none() -> None:
    """The rows that the offset brings again are left out."""
    entries = await read(Log(250, growth=7))
    assert [entry.inference_id for entry in entries] == [f"inf-{number}" for number in reversed(range(250))]


async def test_a_service_that_ignores_the_offset_is_not_asked_for_ever() -> None:
    """A page that brings nothing new is the last one, also of rows without any id."""
    asked: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=[{"status": "failed", "cost": {"credits": number}} for number in range(100)])

    assert len(await read(handler)) == 100
    assert len(asked) == 2


# What is read


async def test_a_row_as_the_service_documents_it() -> None:
    """Ids, outcome, cost and time."""
    assert await read(answer({"data": [DOCUMENTED], "pagination": {"total": 1, "has_more": False}})) == [
        LogEntry(
            client_request_id="customer-42",
            inference_id="inf-1",
            status="succeeded",
            succeeded=True,
            credits=500_000,
            created_at=datetime(2026, 7, 2, 3, 4, 5, tzinfo=timezone.utc),
        )
    ]


@pytest.mark.parametrize("body", [[DOCUMENTED], {"logs": [DOCUMENTED]}, {"items": [DOCUMENTED], "data": None}])
async def test_the_rows_are_found_under_other_names(body: Any) -> None:
    """A list is a list."""
    assert [entry.client_request_id for entry in await read(answer(body))] == ["customer-42"]


@pytest.mark.parametrize("body", ["soon", None, {}, {"data": None}, {"data": {}}, ["x"], {"data": [DOCUMENTED, None]}])
async def test_a_log_that_is_none_is_an_invalid_response(body: Any) -> None:
    """It is not taken for an empty one, and nothing was billed."""
    with pytest.raises(InvalidResponse) as raised:
        await read(answer(body))
    assert raised.value.billed is Billed.NO


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"client_request_id": None}, {"client_request_id": None}),
        ({"client_request_id": 42}, {"client_request_id": None}),
        ({"inference_id": None}, {"inference_id": None}),
        ({"cost": None}, {"credits": None}),
        ({"cost": 0.25}, {"credits": None}),  # of which currency?
        ({"cost": {}}, {"credits": None}),
        ({"cost": {"credits": "168000", "usd": "0.084"}}, {"credits": 168_000}),
        ({"cost": {"credits": None, "usd": "0.25"}}, {"credits": 500_000}),
        ({"cost": {"credits": "many"}}, {"credits": None}),
        ({"cost": {"credits": 0, "usd": 0}}, {"credits": 0}),
        ({"status": "failed"}, {"succeeded": False}),
        ({"status": "Success"}, {"succeeded": True}),
        ({"status": "error"}, {"succeeded": False}),
        ({"status": "processing"}, {"succeeded": None, "status": "processing"}),
        ({"status": 200}, {"succeeded": None, "status": None}),
        ({"created": "2026-07-02T06:04:05+03:00"}, {"created_at": START + timedelta(minutes=4, seconds=5)}),
        ({"created": "2026-07-02T03:04:05"}, {"created_at": START + timedelta(minutes=4, seconds=5)}),
        ({"created": "yesterday"}, {"created_at": None}),
        ({"created": "0001-01-01T00:00:00+05:00"}, {"created_at": None}),
        ({"created": None}, {"created_at": None}),
    ],
    ids=str,
)
async def test_a_field_that_is_odd_or_missing_costs_no_row(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """What can be read of it is read, and the rest is unknown."""
    (entry,) = await read(answer({"data": [{**DOCUMENTED, **changes}]}))
    assert entry.model_dump(include=set(expected)) == expected


async def test_an_empty_row_is_a_row() -> None:
    """Of which nothing is known."""
    assert await read(answer({"data": [{}]})) == [LogEntry()]


@pytest.mark.parametrize(
    ("entry", "billed"),
    [
        (LogEntry(succeeded=True, credits=168_000), Billed.YES),
        (LogEntry(succeeded=True), Billed.YES),
        (LogEntry(succeeded=True, credits=0), Billed.UNKNOWN),  # the service charges after it has answered
        (LogEntry(succeeded=False, credits=0), Billed.NO),
        (LogEntry(succeeded=False), Billed.NO),
        (LogEntry(succeeded=False, credits=168_000), Billed.YES),  # a cost is a cost
        (LogEntry(credits=168_000), Billed.YES),
        (LogEntry(credits=0), Billed.UNKNOWN),
        (LogEntry(), Billed.UNKNOWN),
    ],
)
def test_what_a_row_proves(entry: LogEntry, billed: Billed) -> None:
    """A cost and a failure prove something, a success that has cost nothing yet does not."""
    assert entry.billed is billed


# What goes wrong


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (httpx.Response(401), AuthenticationFailed),
        (httpx.Response(404), NotFound),
        (httpx.Response(429), RateLimited),
        (httpx.Response(500), ServerFailed),
        (httpx.Response(200, text="<html>"), InvalidResponse),
        (httpx.ConnectError(""), NotSent),
        (httpx.ReadTimeout(""), AnswerLost),
    ],
)
async def test_a_log_that_cannot_be_read_costs_nothing(
    given: httpx.Response | Exception, kind: type[ServiceError]
) -> None:
    """The errors are those of the balance: typed, raised at once, never billed."""
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if isinstance(given, Exception):
            raise given
        return given

    with pytest.raises(kind) as raised:
        await read(handler)
    assert raised.value.billed is Billed.NO
    assert KEY not in str(raised.value)
    assert len(requests) == 1


async def test_the_log_of_the_stand_in(sandbox: RunningSandbox) -> None:
    """Read over a socket, page after page, by its own names for things."""
    key = sandbox.environment["AIMLAPI_KEY"]
    body = {"model": "flux/kontext-max/text-to-image", "prompt": "a lighthouse", "seed": 7}
    sandbox.control.inject("server_error", times=119)
    async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False) as http:

        async def post(number: int) -> None:
            headers = {"Authorization": f"Bearer {key}", "X-Client-Request-Id": f"call-{number}"}
            await http.post("/v1/images/generations", json=body, headers=headers)

        await asyncio.gather(*map(post, range(119)))
        await post(119)
    now = datetime.now(timezone.utc)
    async with AimlApiClient(api_key=SecretStr(key), base_url=sandbox.url, pacer=Pacer(1)) as client:
        pages = [page async for page in client.log_pages(now - timedelta(hours=1), now + timedelta(minutes=1))]
        before = [page async for page in client.log_pages(now - timedelta(hours=2), now - timedelta(hours=1))]
    assert [len(page) for page in pages] == [100, 20]
    newest, *others = [entry for page in pages for entry in page]
    assert (newest.client_request_id, newest.billed) == ("call-119", Billed.YES)
    assert newest.credits == sandbox.control.settings().price
    assert newest.created_at is not None
    assert abs(newest.created_at - now) < timedelta(minutes=1)
    assert {entry.client_request_id for entry in others} == {f"call-{number}" for number in range(119)}
    assert {entry.billed for entry in others} == {Billed.NO}
    assert before == []
