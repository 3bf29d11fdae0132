from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import logging
import pickle
import re
import socket
import traceback
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from pydantic import SecretStr

from flux_prefect.api.answers import RawAnswer
from flux_prefect.api.client import AimlApiClient, Timeouts
from flux_prefect.api.models import CREDITS_PER_USD, ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.errors import (
    AccessRefused,
    AnswerLost,
    AuthenticationFailed,
    Billed,
    EmptyGeneration,
    FluxError,
    GenerationTimedOut,
    InvalidResponse,
    NotFound,
    NotSent,
    OutOfCredits,
    RateLimited,
    RequestRefused,
    ServerFailed,
    ServiceBusy,
    StatusError,
)

from .raw_server import answer, reset, serve

KEY = "sk-test-5f0c1d7e9a"
URL = "https://cdn.aimlapi.com/one.jpg"
GOOD = {"data": [{"url": URL}], "meta": {"usage": {"credits_used": 168000}}}


def make_client(
    handler: Callable[[httpx.Request], httpx.Response] | None = None,
    *,
    base_url: str = "https://api.example",
    pacer: Pacer | None = None,
    key: str = KEY,
    max_bytes: int = 10_000,
    timeouts: Timeouts | None = None,
    library: str = "aiohttp",
) -> AimlApiClient:
    """A client with this handler in place of the service, or with the real network by one of the libraries."""
    real = httpx.AsyncHTTPTransport() if library == "httpx" else None
    return AimlApiClient(
        api_key=SecretStr(key),
        base_url=base_url,
        pacer=pacer or Pacer(4),
        timeouts=timeouts,
        max_bytes=max_bytes,
        transport=real if handler is None else httpx.MockTransport(handler),
    )


class Service:
    """Answers in the order given, the last one for ever, and keeps the requests."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        self.requests.append(request)
        given = self._answers[min(len(self.requests), len(self._answers)) - 1]
        if isinstance(given, Exception):
            raise given
        return httpx.Response(given.status_code, headers=given.headers, content=given.content)


def refuse(status: int, body: Any = None, **headers: str) -> httpx.Response:
    """An error answer."""
    return httpx.Response(status, json=body or {"message": "slow down"}, headers=headers)


async def fail(service: Service, request: ImageRequest, timeouts: Timeouts | None = None) -> FluxError:
    """The error that a call ends with."""
    async with make_client(service, timeouts=timeouts) as client:
        with pytest.raises(FluxError) as raised:
            await client.generate(request, client_request_id="fp-1")
    return raised.value


# What is sent


async def test_one_post_with_the_request_and_our_id(lighthouse: ImageRequest) -> None:
    """Path, bearer token, id and body are what the service's document asks for."""
    service = Service(httpx.Response(200, json=GOOD))
    async with make_client(service) as client:
        generation = await client.generate(lighthouse)
    (request,) = service.requests
    assert (request.method, str(request.url)) == ("POST", "https://api.example/v1/images/generations")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert json.loads(request.content) == lighthouse.payload()
    assert re.fullmatch(r"fp-[0-9a-f]{32}", request.headers["x-client-request-id"])
    assert generation.client_request_id == request.headers["x-client-request-id"]
    assert generation.endpoint == "https://api.example"
    assert generation.credits_used == 168000


@pytest.mark.parametrize("status", [200, 201, 202])
async def test_any_success_status_is_read(status: int, lighthouse: ImageRequest) -> None:
    """Older documents of the service say 201."""
    async with make_client(Service(httpx.Response(status, json=GOOD))) as client:
        assert (await client.generate(lighthouse)).images[0].url == URL


@pytest.mark.parametrize("bad", ["", "a b", "ä", "x" * 129, "fp/1", "fp-1\n"])
async def test_an_id_that_the_service_would_drop_is_refused(bad: str, lighthouse: ImageRequest) -> None:
    """A dropped id would make a paid call impossible to find."""
    service = Service(httpx.Response(200, json=GOOD))
    async with make_client(service) as client:
        with pytest.raises(ValueError, match="client_request_id"):
            await client.generate(lighthouse, client_request_id=bad)
    assert not service.requests


async def test_before_send_runs_right_before_each_post(lighthouse: ImageRequest) -> None:
    """Also before the one that follows a refusal, and while the slot is held."""
    pacer = Pacer(1)
    service = Service(refuse(429, **{"Retry-After": "0"}), httpx.Response(200, json=GOOD))
    notified: list[tuple[int, int]] = []

    async def note() -> None:
        notified.append((len(service.requests), pacer.in_flight))

    async with make_client(service, pacer=pacer) as client:
        await client.generate(lighthouse, before_send=note)
    assert notified == [(0, 1), (1, 1)]


async def test_a_caller_that_objects_stops_the_call(lighthouse: ImageRequest) -> None:
    """Nothing is sent, its error comes through whatever it is, and the slot is free again."""
    pacer = Pacer(1)
    service = Service(httpx.Response(200, json=GOOD))

    async def object_() -> None:
        raise TimeoutError("the journal is locked")

    async with make_client(service, pacer=pacer) as client:
        with pytest.raises(TimeoutError, match="journal"):
            await client.generate(lighthouse, before_send=object_)
    assert not service.requests
    assert pacer.in_flight == 0


async def test_the_answer_that_is_kept_is_the_one_that_is_parsed(lighthouse: ImageRequest) -> None:
    """A record of the kept answer has the time of the generation, so that either stands for the other."""
    kept: list[RawAnswer] = []

    async def keep(answer: RawAnswer) -> None:
        kept.append(answer)
        await asyncio.sleep(0.01)

    async with make_client(Service(httpx.Response(200, json=GOOD))) as client:
        generation = await client.generate(lighthouse, on_answer=keep)
    assert [answer.received_at for answer in kept] == [generation.created_at]


# Error statuses


@pytest.mark.parametrize(
    ("status", "message", "kind", "retryable", "billed", "fatal"),
    [
        (400, "prompt: too long", RequestRefused, False, Billed.NO, False),
        (402, "Payment required: no credits", OutOfCredits, False, Billed.NO, True),
        (402, "Payment required", RequestRefused, False, Billed.NO, False),
        (401, "Invalid token", AuthenticationFailed, False, Billed.NO, True),
        (403, "You've run out of credits", OutOfCredits, False, Billed.NO, True),
        (403, "Your BALANCE is too low", OutOfCredits, False, Billed.NO, True),
        (403, "Not for your country", AccessRefused, False, Billed.NO, False),
        (404, "No such model", NotFound, False, Billed.NO, False),
        (408, "Too slow", GenerationTimedOut, True, Billed.UNKNOWN, False),
        (413, "Too large", RequestRefused, False, Billed.NO, False),
        (422, "Blocked by moderation", RequestRefused, False, Billed.NO, False),
        (499, "Odd", RequestRefused, False, Billed.NO, False),
        (500, "Upstream failed", ServerFailed, True, Billed.NO, False),
        (502, "Bad gateway", ServerFailed, True, Billed.NO, False),
        (503, "Under maintenance", ServiceBusy, True, Billed.NO, False),
        (504, "Generation timeout", GenerationTimedOut, True, Billed.UNKNOWN, False),
        (524, "A timeout occurred", GenerationTimedOut, True, Billed.UNKNOWN, False),
        (529, "Odd", ServerFailed, True, Billed.NO, False),
    ],
)
@pytest.mark.parametrize("problem_json", [False, True])
async def test_each_status_is_its_own_error_and_is_raised_once(
    status: int,
    message: str,
    kind: type[StatusError],
    retryable: bool,  # noqa: FBT001 - a column
    billed: Billed,
    fatal: bool,  # noqa: FBT001 - a column
    problem_json: bool,  # noqa: FBT001 - a column
    lighthouse: ImageRequest,
) -> None:
    """In both envelopes, with the service's words and ids, and after a single request."""
    envelope: dict[str, Any] = (
        {"title": "Error", "status": status, "requestId": "r-1", "error": {"name": "E", "message": message}}
        if problem_json
        else {"message": message, "path": "/", "requestId": "r-1", "statusCode": str(status)}
    )
    service = Service(refuse(status, envelope))
    error = await fail(service, lighthouse)
    assert isinstance(error, StatusError)
    assert type(error) is kind
    assert (error.retryable, error.billed, error.fatal) == (retryable, billed, fatal)
    assert (error.status, error.request_id, error.client_request_id) == (status, "r-1", "fp-1")
    assert message in error.message
    assert "fp-1" in error.message
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"message": ["seed: too large", "prompt: blank"]}', "seed: too large; prompt: blank"),
        (b'{"error": "bad seed"}', "bad seed"),
        (b'{"detail": "bad seed"}', "bad seed"),
        (b'{"title": "Bad Request", "message": ""}', "Bad Request: Bad Request"),
        (b"bad\n  seed", "bad seed"),
        (b"<!DOCTYPE html><html><title>502</title>", "a page of HTML"),
        (b'{"message": "\\ud800"}', "400 Bad Request: ?"),
        (b"\xff\xfe\xff", "400 Bad Request"),
        (b"[" * 100_000, "400 Bad Request"),
        (b'["a list"]', "a list"),
        (b"", "The service answered 400 Bad Request. "),
        (b'{"message": "' + b"x" * 9000 + b'"}', "x" * 499 + "…"),
        (b'{"message": "' + b"x" * 900_000 + b'"}', "x" * 400),
    ],
)
async def test_any_body_of_an_error_is_read(body: bytes, said: str, lighthouse: ImageRequest) -> None:
    """Envelope, text, a proxy's page or junk: the message stays short, and can be stored."""
    error = await fail(Service(httpx.Response(400, content=body)), lighthouse)
    assert said in error.message
    assert len(error.message) < 700
    assert error.message.encode("utf-8")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_paid_call_is_never_redirected(status: int, lighthouse: ImageRequest) -> None:
    """The key stays where it belongs, and the message says what to correct."""
    service = Service(httpx.Response(status, headers={"Location": "https://elsewhere.example/v1"}))
    error = await fail(service, lighthouse)
    assert isinstance(error, RequestRefused)
    assert "elsewhere.example" in error.message
    assert "base_url" in error.message
    assert len(service.requests) == 1


# Answers lost and calls not sent


@pytest.mark.parametrize(
    ("raised", "kind", "billed"),
    [
        (httpx.ConnectError("refused"), NotSent, Billed.NO),
        (httpx.ConnectTimeout(""), NotSent, Billed.NO),
        (httpx.PoolTimeout(""), NotSent, Billed.NO),
        (httpx.ProxyError("407"), NotSent, Billed.NO),
        (httpx.WriteError(""), NotSent, Billed.NO),
        (httpx.WriteTimeout(""), NotSent, Billed.NO),
        (httpx.UnsupportedProtocol(""), NotSent, Billed.NO),
        (httpx.ReadTimeout(""), AnswerLost, Billed.UNKNOWN),
        (httpx.ReadError(""), AnswerLost, Billed.UNKNOWN),
        (httpx.RemoteProtocolError(""), AnswerLost, Billed.UNKNOWN),
        (httpx.DecodingError(""), AnswerLost, Billed.UNKNOWN),
    ],
)
async def test_a_broken_connection_says_whether_the_call_was_sent(
    raised: httpx.TransportError, kind: type[FluxError], billed: Billed, lighthouse: ImageRequest
) -> None:
    """Not sent is not billed; sent without an answer is possibly billed; neither is repeated here."""
    service = Service(raised)
    error = await fail(service, lighthouse)
    assert type(error) is kind
    assert (error.billed, error.retryable) == (billed, True)
    assert len(service.requests) == 1


async def test_a_closed_port_means_not_sent(lighthouse: ImageRequest) -> None:
    """A real refused connection."""
    with socket.socket() as bound:  # and never listening
        bound.bind(("127.0.0.1", 0))
        async with make_client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}") as client:
            with pytest.raises(NotSent, match="nothing was sent"):
                await client.generate(lighthouse)


async def test_a_reset_after_sending_loses_the_answer(lighthouse: ImageRequest) -> None:
    """A real reset."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        reset(writer)

    async with serve(handler) as server, make_client(base_url=server.url) as client:
        with pytest.raises(AnswerLost, match="fp-1"):
            await client.generate(lighthouse, client_request_id="fp-1")
        assert len(server.requests) == 1


async def test_a_closed_connection_loses_the_answer(lighthouse: ImageRequest) -> None:
    """Closed without a byte."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with serve(handler) as server, make_client(base_url=server.url) as client:
        with pytest.raises(AnswerLost):
            await client.generate(lighthouse)


async def test_a_cut_answer_is_lost(lighthouse: ImageRequest) -> None:
    """Fewer bytes than announced."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b'{"data": [', length=500))

    async with serve(handler) as server, make_client(base_url=server.url) as client:
        with pytest.raises(AnswerLost):
            await client.generate(lighthouse)


async def test_a_silent_service_loses_the_answer(lighthouse: ImageRequest) -> None:
    """After the read time-out."""

    async def handler(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with serve(handler) as server, make_client(base_url=server.url, timeouts=Timeouts(read=0.05)) as client:
        with anyio.fail_after(5), pytest.raises(AnswerLost, match="ReadTimeout"):
            await client.generate(lighthouse)


async def test_a_trickling_answer_ends_at_the_overall_deadline(lighthouse: ImageRequest) -> None:
    """Every byte comes within the read time-out, but a call has an end."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", length=100_000))
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serve(handler) as server, make_client(base_url=server.url, timeouts=Timeouts(generation=0.1)) as client:
        with anyio.fail_after(5), pytest.raises(AnswerLost, match=r"not over after 0\.1 s"):
            await client.generate(lighthouse)


async def test_a_refusal_with_a_cut_body_is_still_a_refusal(lighthouse: ImageRequest) -> None:
    """Its status has been read, so nothing is lost and nothing paid."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b'{"message": "Inva', status="401 Unauthorized", length=500))

    async with serve(handler) as server, make_client(base_url=server.url) as client:
        with pytest.raises(AuthenticationFailed):
            await client.generate(lighthouse)


async def test_every_call_has_a_connection_of_its_own(lighthouse: ImageRequest) -> None:
    """A kept connection that the service just closed could pass for a lost answer."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(json.dumps(GOOD).encode()))
        await writer.drain()
        await asyncio.sleep(0.01)

    async with serve(handler) as server, make_client(base_url=server.url) as client:
        for _ in range(3):
            await client.generate(lighthouse)
        assert len(server.requests) == 3


async def test_cancellation_in_flight_comes_through_and_frees_the_slot(lighthouse: ImageRequest) -> None:
    """A cancelled run stops at once."""
    pacer = Pacer(1)
    waiting = asyncio.Event()

    async def handler(_: asyncio.StreamWriter) -> None:
        waiting.set()
        await asyncio.sleep(30)

    async with serve(handler) as server, make_client(base_url=server.url, pacer=pacer) as client:
        call = asyncio.create_task(client.generate(lighthouse))
        await waiting.wait()
        call.cancel()
        with anyio.fail_after(2), pytest.raises(asyncio.CancelledError):
            await call
    assert pacer.in_flight == 0


# Odd successes


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"data": [', b"[" * 100_000, b"\xff\xfe", b"null"])
async def test_a_success_that_is_no_json_object_is_an_invalid_response(body: bytes, lighthouse: ImageRequest) -> None:
    """Perhaps paid, and with our id to look it up by."""
    error = await fail(Service(httpx.Response(200, content=body)), lighthouse)
    assert type(error) is InvalidResponse
    assert error.billed is Billed.UNKNOWN
    assert "fp-1" in error.message


async def test_an_invalid_response_with_a_bill_was_paid(lighthouse: ImageRequest) -> None:
    """The cost stands in the headers."""
    service = Service(httpx.Response(200, content=b"<html>", headers={"x-aimlapi-credits-used": "168000"}))
    assert (await fail(service, lighthouse)).billed is Billed.YES


async def test_a_success_without_an_image_is_an_empty_generation(lighthouse: ImageRequest) -> None:
    """It happens."""
    assert type(await fail(Service(httpx.Response(200, json={"data": []})), lighthouse)) is EmptyGeneration


async def test_an_answer_without_end_is_not_read_to_its_end(lighthouse: ImageRequest) -> None:
    """Memory has a bound: what the images asked for can take inline, and some room."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in itertools.count():
            sent += 100_000
            yield b" " * 100_000

    async with make_client(lambda _: httpx.Response(200, content=endless())) as client:
        with pytest.raises(InvalidResponse, match="max_bytes") as raised:
            await client.generate(lighthouse)
    assert sent < 2_000_000
    assert (raised.value.billed, raised.value.retryable) == (Billed.UNKNOWN, False)


@pytest.mark.parametrize("library", ["aiohttp", "httpx"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate", "gzip, x-gzip", "identity"])
async def test_an_answer_that_is_packed_all_the_same_is_read(
    encoding: str, library: str, lighthouse: ImageRequest
) -> None:
    """No encoding is asked for. What was paid for is read whatever a proxy made of it."""
    body = json.dumps({"data": [{"url": "https://images.example/0.jpg"}]}).encode()
    packed = {
        "gzip": gzip.compress(body),
        "deflate": zlib.compress(body),
        "raw deflate": zlib.compress(body, wbits=-15),
        "gzip, x-gzip": gzip.compress(gzip.compress(body)),
        "identity": body,
    }[encoding]

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(packed, headers=f"Content-Encoding: {encoding.removeprefix('raw ')}\r\n"))

    async with serve(handler) as server, make_client(base_url=server.url, library=library) as client:
        generation = await client.generate(lighthouse)
    assert generation.images[0].url == "https://images.example/0.jpg"
    assert "accept-encoding: identity\r\n" in server.requests[0].lower()


@pytest.mark.parametrize("library", ["aiohttp", "httpx"])
@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "gzip, br"])
async def test_a_packed_answer_is_unpacked_up_to_a_limit(encoding: str, library: str, lighthouse: ImageRequest) -> None:
    """2 KB that unpack to 1.3 GiB are kept as they came, as is what can't be unpacked: it may have been paid for."""
    bomb = (Path(__file__).parents[1] / "data" / "1331_MiB.gz.gz").read_bytes()
    kept: list[RawAnswer] = []

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(bomb, headers=f"Content-Encoding: {encoding}\r\n"))

    async def keep(raw: RawAnswer) -> None:
        kept.append(raw)

    async with serve(handler) as server, make_client(base_url=server.url, library=library) as client:
        tracemalloc.start()
        try:
            with pytest.raises(InvalidResponse) as raised:
                await client.generate(lighthouse, on_answer=keep)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert raised.value.billed is Billed.UNKNOWN
    assert [raw.content for raw in kept] == [bomb]
    assert peak < 20_000_000  # the limit is 2.4 MB here


@pytest.mark.parametrize("library", ["aiohttp", "httpx"])
async def test_a_packed_refusal_is_read_up_to_a_limit(library: str, lighthouse: ImageRequest) -> None:
    """Its start says what is wrong."""
    packed = gzip.compress(gzip.compress(b"no such model " * 10_000_000))

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(packed, status="400 Bad Request", headers="Content-Encoding: gzip, gzip\r\n"))

    async with serve(handler) as server, make_client(base_url=server.url, library=library) as client:
        tracemalloc.start()
        try:
            with pytest.raises(RequestRefused, match="no such model no such model"):
                await client.generate(lighthouse)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 20_000_000


async def test_a_refusal_without_end_is_not_read_to_its_end(lighthouse: ImageRequest) -> None:
    """Its start says enough."""

    async def endless() -> AsyncIterator[bytes]:
        for count in itertools.count():
            assert count < 10
            yield b"x" * 20_000

    async with make_client(lambda _: httpx.Response(400, content=endless())) as client:
        with pytest.raises(RequestRefused, match="xxx"):
            await client.generate(lighthouse)


async def test_four_inline_images_of_the_largest_size_fit() -> None:
    """The bound follows max_bytes and num_images."""
    inline = "A" * (1_500_000 * 4 // 3)
    body = {"data": [{"b64_json": inline}] * 4}
    async with make_client(Service(httpx.Response(200, json=body)), max_bytes=1_500_000) as client:
        generation = await client.generate(ImageRequest(prompt="a lighthouse", num_images=4))
    assert [len(image.url or "") for image in generation.images] == [len(inline) + 23] * 4


# Pacing


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_that_says_later_is_sent_again_after_its_pause(status: int, lighthouse: ImageRequest) -> None:
    """Under the same id, with the limit halved."""
    pacer = Pacer(4)
    service = Service(refuse(status, **{"Retry-After": "0.1"}), httpx.Response(200, json=GOOD))
    started = asyncio.get_running_loop().time()
    async with make_client(service, pacer=pacer) as client:
        generation = await client.generate(lighthouse)
    assert asyncio.get_running_loop().time() - started >= 0.1
    assert len(service.requests) == 2
    assert {request.headers["x-client-request-id"] for request in service.requests} == {generation.client_request_id}
    assert pacer.limit == 2


@pytest.mark.parametrize(("status", "kind"), [(429, RateLimited), (503, ServiceBusy)])
async def test_when_the_time_for_waiting_is_over_the_refusal_is_final(
    status: int, kind: type[StatusError], lighthouse: ImageRequest
) -> None:
    """The client has waited already: the error is not retryable and names the wait."""
    service = Service(refuse(status, **{"Retry-After": "0.05"}))
    error = await fail(service, lighthouse, Timeouts(pacing=0.18))
    assert type(error) is kind
    assert (error.retryable, error.billed) == (False, Billed.NO)
    assert 2 <= len(service.requests) <= 4
    assert f"refused {len(service.requests)} times" in error.message
    assert "pacing" in error.message


async def test_a_retry_after_beyond_the_deadline_is_not_waited_for(lighthouse: ImageRequest) -> None:
    """No waiting would help; the error carries what the service asked for."""
    service = Service(refuse(429, **{"Retry-After": "3600"}))
    with anyio.fail_after(2):
        error = await fail(service, lighthouse, Timeouts(pacing=60))
    assert isinstance(error, RateLimited)
    assert error.retry_after == 3600
    assert len(service.requests) == 1


async def test_a_429_without_retry_after_is_paced_by_backoff(lighthouse: ImageRequest) -> None:
    """Waiting is bounded by the pacing time-out all the same."""
    service = Service(refuse(429))
    with anyio.fail_after(3):
        error = await fail(service, lighthouse, Timeouts(pacing=0.2))
    assert isinstance(error, RateLimited)


async def test_one_mad_retry_after_does_not_stop_the_process_for_a_day(lighthouse: ImageRequest) -> None:
    """The pause for everybody ends with the pacing time-out."""
    pacer = Pacer(4)
    service = Service(refuse(429, **{"Retry-After": "86400"}), httpx.Response(200, json=GOOD))
    async with make_client(service, pacer=pacer, timeouts=Timeouts(pacing=0.1)) as client:
        with pytest.raises(RateLimited):
            await client.generate(lighthouse)
        with anyio.fail_after(2):
            await client.generate(lighthouse)


@pytest.mark.parametrize(("given", "limit"), [(httpx.Response(200, json=GOOD), 4), (refuse(400), 4), (refuse(500), 3)])
async def test_the_limit_grows_again_with_what_the_service_takes(
    given: httpx.Response, limit: int, lighthouse: ImageRequest
) -> None:
    """A refused request was taken as well; a failure of the service proves no capacity."""
    service = Service(refuse(429, **{"Retry-After": "0"}), *[httpx.Response(200, json=GOOD)] * 2, given)
    pacer = Pacer(4)
    async with make_client(service, pacer=pacer) as client:
        for _ in range(2):
            await client.generate(lighthouse)
        assert pacer.limit == 3
        for _ in range(3):
            with contextlib.suppress(StatusError):
                await client.generate(lighthouse)
    assert pacer.limit == limit


async def test_a_503_without_a_time_is_not_waited_for(lighthouse: ImageRequest) -> None:
    """It is a failure, and repeating it is somebody else's decision."""
    service = Service(refuse(503))
    error = await fail(service, lighthouse)
    assert (type(error), error.retryable, len(service.requests)) == (ServiceBusy, True, 1)


async def test_a_call_in_the_line_gives_up_with_the_others(lighthouse: ImageRequest) -> None:
    """It was never sent, and says so."""
    pacer = Pacer(1)
    service = Service(httpx.Response(200, json=GOOD))
    other = pacer.turn(60)
    async with pacer.slot(other):
        pacer.refused(other, 0.0)
        async with make_client(service, pacer=pacer, timeouts=Timeouts(pacing=0.05)) as client:
            with pytest.raises(RateLimited, match="Not sent") as raised:
                await client.generate(lighthouse)
    assert raised.value.billed is Billed.NO
    assert not service.requests


async def test_all_clients_of_a_pacer_keep_to_its_limit_together(lighthouse: ImageRequest) -> None:
    """Twelve calls of two clients, never more than three at once."""
    pacer = Pacer(3)
    inside = most = 0

    async def handler(writer: asyncio.StreamWriter) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.01)
        inside -= 1
        writer.write(answer(json.dumps(GOOD).encode()))

    async with (
        serve(handler) as server,
        make_client(base_url=server.url, pacer=pacer) as one,
        make_client(base_url=server.url, pacer=pacer) as two,
    ):
        await asyncio.gather(*(client.generate(lighthouse) for client in (one, two) * 6))
    assert most == 3


# Balance


@pytest.mark.parametrize(
    ("body", "usd"),
    [({"current_balance": 12.5, "currency": "USD"}, 12.5), ({"current_balance": -1}, -1.0)],
)
async def test_the_balance_is_given_in_both_units(body: dict[str, Any], usd: float) -> None:
    """From the service's dollars."""
    service = Service(httpx.Response(200, json=body))
    async with make_client(service) as client:
        balance = await client.balance()
    assert (balance.usd, balance.credits) == (usd, usd * CREDITS_PER_USD)
    assert (service.requests[0].method, service.requests[0].url.path) == ("GET", "/v2/billing")
    assert service.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_the_older_balance_is_asked_for_where_the_new_one_is_missing() -> None:
    """In credits."""
    service = Service(refuse(404), httpx.Response(200, json={"balance": 3_000_000, "status": "current"}))
    async with make_client(service) as client:
        balance = await client.balance()
    assert (balance.credits, balance.usd) == (3_000_000, 1.5)
    assert service.requests[1].url.path == "/v1/billing/balance"


@pytest.mark.parametrize(
    "body", [{}, [], {"current_balance": "12"}, {"current_balance": True}, {"current_balance": 1, "currency": "EUR"}]
)
async def test_a_balance_that_cannot_be_read_is_an_invalid_response(body: Any) -> None:
    """A wrong amount would be worse, and nothing was billed."""
    async with make_client(Service(httpx.Response(200, json=body))) as client:
        with pytest.raises(InvalidResponse) as raised:
            await client.balance()
    assert raised.value.billed is Billed.NO


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (httpx.ConnectError(""), NotSent),
        (httpx.ReadTimeout(""), AnswerLost),
        (refuse(401), AuthenticationFailed),
        (refuse(404), NotFound),
    ],
)
async def test_a_failed_look_at_the_balance_costs_nothing(
    given: httpx.Response | Exception, kind: type[FluxError]
) -> None:
    """The same errors, never billed."""
    async with make_client(Service(given)) as client:
        with pytest.raises(kind) as raised:
            await client.balance()
    assert raised.value.billed is Billed.NO


# Settings and secrets


@pytest.mark.parametrize(
    "base_url",
    [
        "api.example",
        "ftp://api.example",
        "https://",
        "https://user:secret@api.example",
        "https://api.example?x=1",
        "https://api.example#x",
    ],
)
def test_a_base_url_that_is_no_root_is_refused(base_url: str) -> None:
    """It goes into fingerprints and sidecars, so it holds no user and no query."""
    with pytest.raises(ValueError, match="base_url") as refused:
        make_client(base_url=base_url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("key", ["", "  ", "sk secret", "sk-secret\nx", "sk-sécret"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str) -> None:
    """The HTTP library would quote it in its error."""
    with pytest.raises(ValueError, match="api_key") as refused:
        make_client(key=key)
    assert "secret" not in str(refused.value)


async def test_a_line_end_around_the_key_does_not_matter(lighthouse: ImageRequest) -> None:
    """Keys are read from files."""
    service = Service(httpx.Response(200, json=GOOD))
    async with make_client(service, key=f"{KEY}\n") as client:
        await client.generate(lighthouse)
    assert service.requests[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_a_positive_number(value: float) -> None:
    """No call waits for ever."""
    with pytest.raises(ValueError, match="generation"):
        Timeouts(generation=value)


@pytest.mark.parametrize(
    "given",
    [
        refuse(401, {"message": f"Invalid token {KEY}", "requestId": KEY}),
        httpx.Response(400, content=f"Bearer {KEY} " * 200),
        httpx.Response(307, headers={"Location": f"https://elsewhere.example/?key={KEY}"}),
        httpx.Response(200, content=f"Bearer {KEY}"),
        httpx.Response(200, json={"data": KEY}),
        httpx.ReadError("reset"),
        httpx.ConnectError("refused"),
    ],
)
async def test_the_key_is_in_no_error_and_no_log(
    given: httpx.Response | Exception, lighthouse: ImageRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where the service echoes it: message, attributes, traceback, pickle and log."""
    with caplog.at_level(logging.DEBUG):
        error = await fail(Service(given), lighthouse)
    exposed = [str(error), repr(error), repr(vars(error)), caplog.text, pickle.dumps(error).decode("latin-1")]
    exposed.append("".join(traceback.format_exception(error)))
    assert not [text for text in exposed if KEY in text]


async def test_the_client_shows_itself_without_its_key() -> None:
    """In logs and debuggers."""
    async with make_client() as client:
        assert repr(client) == "AimlApiClient(base_url='https://api.example')"
        assert KEY not in repr(vars(client))
