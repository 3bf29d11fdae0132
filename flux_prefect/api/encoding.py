"""Content encodings of answers: none is asked for, and what comes all the same is unpacked up to a limit.

The HTTP library unpacks a received piece as a whole, whatever its size becomes: a kilobyte that is packed twice can
hold a gigabyte.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import httpx

__all__ = ["Unpacked", "receive", "unpack"]

_GZIP, _ZLIB, _DEFLATE = 31, 15, -15  # zlib's window bits: the kind of header
_KINDS = {"gzip": (_GZIP,), "x-gzip": (_GZIP,), "deflate": (_ZLIB, _DEFLATE)}


class Unpacked(NamedTuple):
    """What a body unpacks to.

    Attributes:
        content: The bytes, or their start.
        is_whole: Whether these are all, and intact.
    """

    content: bytes
    is_whole: bool


async def receive(response: httpx.Response, most: int, body: bytearray | None = None) -> bytes:
    """Receive a body as it was sent, until it ends or has more than `most` bytes.

    Args:
        response: The open response.
        most: Bytes.
        body: Has what came, also if the connection breaks.
    """
    body = bytearray() if body is None else body
    assert isinstance(response.stream, httpx.AsyncByteStream)  # noqa: S101 - all transports here are asynchronous
    async for chunk in response.stream:
        body += chunk
        if len(body) > most:
            break
    return bytes(body)


def unpack(body: bytes, headers: Mapping[str, str], most: int) -> Unpacked:
    """Undo the content encodings of a body, as far as `most` bytes. One that is not known here stays."""
    encodings = [name.strip().lower() for name in headers.get("content-encoding", "").split(",")]
    is_whole = True
    for encoding in reversed([name for name in encodings if name not in {"", "identity"}]):
        kinds = _KINDS.get(encoding)
        if kinds is None:
            return Unpacked(body, is_whole=False)
        # A start unpacks to a start.
        found = max((_inflate(body, kind, most) for kind in kinds), key=lambda found: len(found.content))
        body, is_whole = found.content, is_whole and found.is_whole
    return Unpacked(body, is_whole)


def _inflate(body: bytes, kind: int, most: int) -> Unpacked:
    inflater = zlib.decompressobj(kind)
    try:
        content = inflater.decompress(body, most + 1)
    except zlib.error:
        return Unpacked(b"", is_whole=False)
    return Unpacked(content[:most], is_whole=inflater.eof and not inflater.unused_data and len(content) <= most)
