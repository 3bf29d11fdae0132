"""Answers that a well-behaved server can't give: resets, bodies that end too early, silence.

ASGI has no word for these, so the server's protocol hands every request its transport.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Cut", "Flood", "Reset", "Silence", "TransportProtocol", "Trickle"]

_TRANSPORT = "flux_prefect.sandbox.transport"


class TransportProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with the connection's transport among the request's extensions."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in the base class
        """Start a connection."""
        super().connection_made(transport)
        app: Any = self.app

        async def with_transport(scope: Any, receive: Any, send: Any) -> None:
            scope["extensions"] = {_TRANSPORT: transport}
            await app(scope, receive, send)

        self.app = with_transport


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drop(scope: Scope, receive: Receive, *, reset: bool) -> None:
    transport: asyncio.Transport = scope["extensions"][_TRANSPORT]
    if reset:
        # Closing with a linger time of zero makes the kernel send RST instead of FIN.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
    await _disconnected(receive)


async def _wait_for_disconnect(receive: Receive, seconds: float) -> None:
    with anyio.move_on_after(seconds):
        await _disconnected(receive)


class Reset:
    """The connection is reset without an answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102, ARG002 - as ASGI wants it
        await _drop(scope, receive, reset=True)


@dataclass(frozen=True)
class Silence:
    """Nothing is answered for `seconds`, then the connection is closed. Ends early when the client leaves."""

    seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102, ARG002 - as ASGI wants it
        await _wait_for_disconnect(receive, self.seconds)
        await _drop(scope, receive, reset=False)


@dataclass(frozen=True)
class Cut:
    """A 200 that promises all of `content`, sends half, waits `stall` seconds, and closes or resets."""

    content: bytes
    media_type: str
    stall: float = 0
    reset: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    status_code: ClassVar[int] = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - as ASGI wants it
        length = {"content-length": str(len(self.content))}
        await send(_start(self.media_type, {**self.headers, **length}))
        half = self.content[: len(self.content) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})
        await _wait_for_disconnect(receive, self.stall)
        await _drop(scope, receive, reset=self.reset)


@dataclass(frozen=True)
class Trickle:
    """A whole 200, but its body comes in `pieces`, spread over `seconds`."""

    content: bytes
    media_type: str
    seconds: float
    pieces: int = 20
    headers: Mapping[str, str] = field(default_factory=dict)
    status_code: ClassVar[int] = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102, ARG002 - as ASGI wants it
        length = {"content-length": str(len(self.content))}
        await send(_start(self.media_type, {**self.headers, **length}))
        step = -(-len(self.content) // self.pieces)
        starts = range(0, len(self.content), step)
        for start in starts:
            await anyio.sleep(self.seconds / len(starts))
            await send({"type": "http.response.body", "body": self.content[start : start + step], "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@dataclass(frozen=True)
class Flood:
    """A 200 of unknown length that goes on after `content` until `size` bytes are sent or the client leaves."""

    content: bytes
    media_type: str
    size: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102, ARG002 - as ASGI wants it
        await send(_start(self.media_type, {}))
        async with anyio.create_task_group() as tasks:

            async def stop_when_the_client_leaves() -> None:
                await _disconnected(receive)
                tasks.cancel_scope.cancel()

            tasks.start_soon(stop_when_the_client_leaves)
            for piece in self._pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await anyio.lowlevel.checkpoint()  # a send that needn't wait does not yield to other tasks
            await send({"type": "http.response.body", "body": b""})
            tasks.cancel_scope.cancel()

    def _pieces(self) -> Iterator[bytes]:
        yield self.content[: self.size]
        filler = bytes(256 * 1024)
        for left in range(self.size - len(self.content), 0, -len(filler)):
            yield filler[:left]


def _start(media_type: str, headers: Mapping[str, str]) -> dict[str, Any]:
    fields = {"content-type": media_type, **headers}
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()],
    }
