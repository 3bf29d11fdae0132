"""How requests go out over aiohttp, and what is said of those that fail."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from flux_prefect.api.client import _NEVER_SENT
from flux_prefect.api.transport import AiohttpTransport

from .raw_server import RawServer, answer, reset, serve

SIGNED = "/a%2Fb%20c/one.jpg?X-Amz-Credential=AKIA%2F20260101%2Fs3&X-Amz-Signature=SECRET&sum=a+b%7E;c"


@asynccontextmanager
async def open_client(*, keep: bool = False, timeout: httpx.Timeout | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client over the transport."""
    transport = AiohttpTransport(tls=httpx.create_ssl_context(), keep_alive=keep)
    async with httpx.AsyncClient(transport=transport, timeout=timeout or httpx.Timeout(5)) as client:
        yield client


async def fail(
    url: str, *, method: str = "POST", timeout: httpx.Timeout | None = None, content: bytes = b"{}"
) -> httpx.TransportError:
    """The error of a request, of which no text may hold the signed URL."""
    async with open_client(timeout=timeout) as client:
        with pytest.raises(httpx.TransportError) as caught:
            await client.request(method, url, content=content)
    assert "SECRET" not in str(caught.value)
    return caught.value


async def test_an_answer_comes_as_it_was_sent() -> None:
    """Status, reason, repeated headers, and the body, unpacked."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"body", status="418 I'm a teapot", headers="X-Twice: 1\r\nX-Twice: 2\r\n"))

    async with serve(handler) as server, open_client() as client:
        response = await client.post(server.url, json={"prompt": "a fox"}, headers={"Authorization": "Bearer key"})

    assert (response.status_code, response.reason_phrase, response.content) == (418, "I'm a teapot", b"body")
    assert response.headers.get_list("x-twice") == ["1", "2"]
    head = server.requests[0].lower()
    assert "authorization: bearer key\r\n" in head
    assert "content-type: application/json\r\n" in head
    assert head.count("content-length:") == 1


async def test_a_signed_address_is_not_written_anew() -> None:
    """Byte for byte: a signature holds for nothing else."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b""))

    async with serve(handler) as server, open_client() as client:
        await client.get(f"{server.url}{SIGNED}")

    assert server.requests[0].startswith(f"GET {SIGNED} HTTP/1.1\r\n")


@pytest.mark.parametrize(("keep", "connections"), [(True, 1), (False, 2)])
async def test_connections_are_kept_only_where_wanted(*, keep: bool, connections: int) -> None:
    """A paid call gets a fresh one."""
    peers: set[int] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.add(writer.get_extra_info("peername")[1])
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(answer(b"x"))

    async def quietly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(quietly, "127.0.0.1", 0)
    async with server, open_client(keep=keep) as client:
        for _ in range(2):
            await client.get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    assert len(peers) == connections


async def test_unsent_requests_are_recognised() -> None:
    """A closed port, an unknown name, a failed handshake or an invalid address: nothing was sent."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert isinstance(await fail(f"http://127.0.0.1:{closed.getsockname()[1]}{SIGNED}"), httpx.ConnectError)
    assert isinstance(await fail(f"http://no-such-host.invalid{SIGNED}"), httpx.ConnectError)

    async def not_tls(writer: asyncio.StreamWriter) -> None:
        writer.write(b"this is no handshake")

    async def drop(writer: asyncio.StreamWriter) -> None:
        reset(writer)

    for rude in (not_tls, drop):
        async with serve_raw(rude) as port:
            error = await fail(f"https://127.0.0.1:{port}{SIGNED}")
            assert isinstance(error, _NEVER_SENT)


async def test_a_handshake_without_end_is_a_connect_timeout() -> None:
    """Nothing was sent."""

    async def wait(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async with serve_raw(wait) as port:
        error = await fail(f"https://127.0.0.1:{port}{SIGNED}", timeout=httpx.Timeout(5, connect=0.2))
    assert isinstance(error, httpx.ConnectTimeout)


async def vanish(writer: asyncio.StreamWriter) -> None:
    """End the connection without a word."""
    writer.close()


async def break_off(writer: asyncio.StreamWriter) -> None:
    """Reset the connection."""
    reset(writer)


async def babble(writer: asyncio.StreamWriter) -> None:
    """Answer with something that is no HTTP."""
    writer.write(b"hello there\r\n\r\n")


async def promise_more(writer: asyncio.StreamWriter) -> None:
    """Answer with less than announced."""
    writer.write(answer(b"half", length=8))


async def cut_a_chunk(writer: asyncio.StreamWriter) -> None:
    """End in the middle of a chunk."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf")


async def say_nothing(_: asyncio.StreamWriter) -> None:
    """Let the other side wait."""
    await asyncio.sleep(5)


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (vanish, httpx.RemoteProtocolError),
        (break_off, httpx.ReadError),
        (babble, httpx.RemoteProtocolError),
        (promise_more, httpx.RemoteProtocolError),
        (cut_a_chunk, httpx.RemoteProtocolError),
        (say_nothing, httpx.ReadTimeout),
    ],
)
async def test_what_was_sent_is_never_reported_as_not_sent(
    handler: Callable[[asyncio.StreamWriter], Awaitable[None]], kind: type[httpx.TransportError]
) -> None:
    """It may have been paid for. And it was sent once."""
    async with serve(handler) as server:
        error = await fail(f"{server.url}{SIGNED}", timeout=httpx.Timeout(10, read=2))
        assert len(server.requests) == 1
    assert type(error) is kind
    assert not isinstance(error, _NEVER_SENT)


async def test_an_unread_body_is_left_where_it_is() -> None:
    """Leaving the response closes its connection."""
    server: RawServer
    gone = asyncio.Event()

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"x", length=10_000_000))
        try:
            while True:
                writer.write(b"x" * 100_000)
                await writer.drain()
        except ConnectionError:
            gone.set()

    async with serve(handler) as server, open_client(keep=True) as client:
        async with client.stream("GET", server.url) as response:
            assert response.status_code == 200
        await asyncio.wait_for(gone.wait(), 5)


@asynccontextmanager
async def serve_raw(handler: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    """The port of a server that hears nothing and lets `handler` talk."""

    async def connection(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(writer)
        finally:
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
