"""A SOCKS5 proxy (RFC 1928, RFC 1929) on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum


class Behaviour(Enum):
    """What becomes of a connection."""

    FORWARD = "forward"
    REFUSE = "refuse"
    HANG_UP = "hang up"
    BE_SILENT = "be silent"


@dataclass
class SocksProxy:
    """Where it listens, and what it was asked for.

    Attributes:
        port: its port on 127.0.0.1.
        login: the user and the password that it asks for, or None.
        behaviour: what becomes of connections from now on.
        targets: the hosts and ports that it was asked to connect to, in order.
    """

    port: int = 0
    login: tuple[str, str] | None = None
    behaviour: Behaviour = Behaviour.FORWARD
    targets: list[tuple[str, int]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its URL, with the login."""
        login = "" if self.login is None else f"{':'.join(self.login)}@"
        return f"socks5://{login}127.0.0.1:{self.port}"


@asynccontextmanager
async def open_socks_proxy(login: tuple[str, str] | None = None) -> AsyncIterator[SocksProxy]:
    """Listen for the length of the block."""
    proxy = SocksProxy(login=login)
    connections: set[asyncio.Task[None]] = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await _serve(proxy, reader, writer)
        writer.close()

    listener = await asyncio.start_server(connection, "127.0.0.1", 0)
    proxy.port = listener.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        listener.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _serve(proxy: SocksProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    _, methods = await reader.readexactly(2)
    offered = await reader.readexactly(methods)
    method = 0 if proxy.login is None else 2
    if method not in offered:
        writer.write(b"\x05\xff")
        return
    writer.write(bytes((5, method)))
    if proxy.login is not None:
        await reader.readexactly(1)
        login = tuple([(await _read_text(reader)) for _ in range(2)])
        writer.write(b"\x01\x00" if login == proxy.login else b"\x01\x01")
    _, _, _, kind = await reader.readexactly(4)
    host = await _read_text(reader) if kind == 3 else ".".join(map(str, await reader.readexactly(4)))
    port = int.from_bytes(await reader.readexactly(2), "big")
    proxy.targets.append((host, port))
    if proxy.behaviour is Behaviour.HANG_UP:
        return
    if proxy.behaviour is Behaviour.BE_SILENT:
        await asyncio.sleep(60)
    refused = proxy.behaviour is Behaviour.REFUSE
    writer.write(bytes((5, 5 if refused else 0, 0, 1, 0, 0, 0, 0, 0, 0)))
    if refused:
        return
    there, back = await asyncio.open_connection(host, port)
    try:
        await asyncio.gather(_copy(reader, back), _copy(there, writer))
    finally:
        back.close()


async def _read_text(reader: asyncio.StreamReader) -> str:
    (length,) = await reader.readexactly(1)
    return (await reader.readexactly(length)).decode()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while piece := await source.read(65536):
        target.write(piece)
        await target.drain()
    if target.can_write_eof():
        target.write_eof()
