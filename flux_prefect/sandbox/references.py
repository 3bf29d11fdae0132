"""The reference images of edits: fetched from http(s) and data: URIs before anything is billed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from urllib.parse import unquote_to_bytes

import httpx
from PIL import Image

from flux_prefect.sandbox.schema import Reference

__all__ = ["BadReference", "fetch_reference", "measure_reference"]

_LARGEST = 30_000_000
"""The most bytes of a reference image."""

_SECONDS = 20


class BadReference(Exception):
    """A reference image can't be fetched, or is none; the message has no part of its address."""


async def fetch_reference(uri: str) -> bytes:
    """Fetch the bytes of a reference image, from an http(s) or data: URI. Redirects are not followed.

    Raises:
        BadReference: it can't be fetched, or it is too large.
    """
    scheme = uri.partition(":")[0].lower()
    if scheme == "data":
        return _inline(uri)
    if scheme not in {"http", "https"}:
        raise BadReference("is neither an http(s) nor a data: URI")
    content = bytearray()
    try:
        async with (
            httpx.AsyncClient(timeout=_SECONDS, trust_env=False) as client,
            client.stream("GET", uri) as response,
        ):
            if response.status_code != 200:  # noqa: PLR2004 - OK
                raise BadReference(f"was answered with {response.status_code}")
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > _LARGEST:
                    raise BadReference(f"has more than {_LARGEST:,} bytes")
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise BadReference(f"can't be fetched ({type(error).__name__})") from error
    return bytes(content)


def measure_reference(content: bytes) -> Reference:
    """Decode a reference image and measure it. Takes some milliseconds: call it in a thread.

    Raises:
        BadReference: it does not decode.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
    except Exception as error:  # broken bytes make the decoders raise nearly anything
        raise BadReference("is not an image") from error
    return Reference(sha256=hashlib.sha256(content).hexdigest(), width=width, height=height)


def _inline(uri: str) -> bytes:
    header, comma, data = uri[5:].partition(",")
    if not comma:
        raise BadReference("is no data: URI")
    content = unquote_to_bytes(data)
    try:
        return base64.b64decode(content, validate=True) if header.endswith(";base64") else content
    except binascii.Error as error:
        raise BadReference("is not base64") from error
