"""Images for benchmarks: valid, of the right size in pixels, different for each request, and nearly free."""

from __future__ import annotations

import zlib
from functools import cache
from random import Random

from PIL import Image

from flux_prefect.sandbox.painting.painter import encode
from flux_prefect.sandbox.schema import GenerationBody

__all__ = ["stamp"]

_LARGEST_COMMENT = 65_000
"""A JPEG segment holds at most 65,533 bytes."""

_MARK = 32
"""Bytes of a request's digest."""


def stamp(request: GenerationBody, index: int, size: int) -> bytes:
    """An image of about `size` bytes (never less than its pixels need), the same for the same request.

    The first image of a format, aspect ratio and size is built in some milliseconds; every other is a copy
    with a comment of its own, well under a millisecond.
    """
    head, tail = _template(request.format, request.size, size)
    mark = request.digest(index)
    marked = {"png": _png_chunk, "webp": _webp_chunk, "jpeg": _comment}[request.format](mark)
    return b"".join((head, marked, tail))


@cache
def _template(output_format: str, pixels: tuple[int, int], size: int) -> tuple[bytes, bytes]:
    image = encode(Image.linear_gradient("L").resize(pixels).convert("RGB"), output_format)
    # Noise, so that nothing on the way can compress it.
    padding = Random(0).randbytes(max(size - len(image), 0))  # noqa: S311 - filler
    if output_format == "png":
        end = len(image) - 12  # before IEND, whose chunk is empty
        return image[:end] + _png_chunk(padding), image[end:]
    if output_format == "webp":
        whole = image + _webp_chunk(padding)
        length = len(whole) + len(_webp_chunk(bytes(_MARK))) - 8  # without the container's own header
        return whole[:4] + length.to_bytes(4, "little") + whole[8:], b""
    comments = (_comment(padding[at : at + _LARGEST_COMMENT]) for at in range(0, len(padding), _LARGEST_COMMENT))
    return image[:2], b"".join(comments) + image[2:]


def _comment(content: bytes) -> bytes:
    return b"\xff\xfe" + (len(content) + 2).to_bytes(2, "big") + content


def _webp_chunk(content: bytes) -> bytes:
    return b"spad" + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)


def _png_chunk(content: bytes) -> bytes:
    # Lower case first and second letter: optional and private, so that decoders skip it.
    body = b"spAd" + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
