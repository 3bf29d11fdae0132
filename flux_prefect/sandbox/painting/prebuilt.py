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


def stamp(request: GenerationBody, index: int, size: int) -> bytes:
    """An image of about `size` bytes (never less than its pixels need), the same for the same request.

    The first image of a format, aspect ratio and size is built in some milliseconds; every other is a copy
    with a comment of its own, well under a millisecond.
    """
    head, tail = _template(request.output_format, request.size, size)
    mark = request.digest(index)
    return b"".join((head, _png_chunk(mark) if request.output_format == "png" else _comment(mark), tail))


@cache
def _template(output_format: str, pixels: tuple[int, int], size: int) -> tuple[bytes, bytes]:
    image = encode(Image.linear_gradient("L").resize(pixels).convert("RGB"), output_format)
    # Noise, so that nothing on the way can compress it.
    padding = Random(0).randbytes(max(size - len(image), 0))  # noqa: S311 - filler
    if output_format == "png":
        end = len(image) - 12  # before IEND, whose chunk is empty
        return image[:end] + _png_chunk(padding), image[end:]
    comments = (_comment(padding[at : at + _LARGEST_COMMENT]) for at in range(0, len(padding), _LARGEST_COMMENT))
    return image[:2], b"".join(comments) + image[2:]


def _comment(content: bytes) -> bytes:
    return b"\xff\xfe" + (len(content) + 2).to_bytes(2, "big") + content


def _png_chunk(content: bytes) -> bytes:
    # Lower case first and second letter: optional and private, so that decoders skip it.
    body = b"spAd" + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
