"""Inspection of image files by their bytes alone, not by name or content type."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Literal

from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import OutputFormat
from flux_prefect.errors import ImageTooLarge, NotAnImage, UnexpectedFormat

__all__ = ["InspectedImage", "inspect_image"]

_BLACK_LEVEL = 8
"""The brightest sample, of 255, that an image delivered black may have. Allows for JPEG noise."""

_KnownFormat = Literal["jpeg", "png", "webp", "gif"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER = struct.Struct(">I4s")
_PNG_IMAGE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # chunks that define the pixels; the others are metadata


class InspectedImage(BaseModel):
    """Properties of a complete, decodable image file."""

    model_config = ConfigDict(frozen=True)

    format: OutputFormat = Field(description="The format of the bytes.")
    content_type: str = Field(description="The MIME type of the bytes.")
    width: int = Field(gt=0, description="Pixels.")
    height: int = Field(gt=0, description="Pixels.")
    sha256: str = Field(description="Of the bytes, hex.")
    size: int = Field(gt=0, description="Bytes.")
    black: bool = Field(
        description="Whether every pixel is black: so the service delivers an image that its safety filter blocked."
    )


def inspect_image(path: Path, expected: OutputFormat | None, *, max_pixels: int) -> InspectedImage:
    """Verify that a file is a complete image of the expected format, and measure it. Reads the file once.

    The file is decoded to its end, so a truncated file is detected. Its bytes are never changed. Takes about ten
    milliseconds for an image of one megapixel, and memory for the file and its pixels meanwhile: call it in a
    thread. Safe in many threads at once.

    Args:
        path: the file.
        expected: the requested format; None for any of them.
        max_pixels: the most pixels to decode, as a guard against decompression bombs.

    Raises:
        NotAnImage: the file is something else, or broken. The message describes it.
        ImageTooLarge: more pixels than allowed. Detected in the header, before anything is decoded.
        UnexpectedFormat: a complete image in another format.
        OSError: the file can't be read.
    """
    data = path.read_bytes()
    found = _recognize(data)
    if found is None:
        raise NotAnImage(f"The file delivered as an image is {_describe(data)}.")
    try:
        width, height, black = _measure(data, found, max_pixels)
    except (ImageTooLarge, MemoryError):
        raise
    except Exception as error:  # hostile bytes make Pillow raise nearly anything
        raise NotAnImage(
            f"The file delivered as an image starts as {found.upper()} but does not decode: it is cut or broken "
            f"({str(error) or type(error).__name__}, {len(data):,} bytes)."
        ) from error
    if found == "gif" or (expected is not None and found != expected):
        wanted = "JPEG, PNG or WEBP was expected" if expected is None else f"output_format asked for {expected.upper()}"
        raise UnexpectedFormat(f"The image delivered is {found.upper()} where {wanted}.")
    return InspectedImage(
        format=found,
        content_type=f"image/{found}",
        width=width,
        height=height,
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        black=black,
    )


def _measure(data: bytes, found: _KnownFormat, max_pixels: int) -> tuple[int, int, bool]:
    image = _open(data, found)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"The image delivered is {width} x {height} pixels, over the limit of {max_pixels:,} "
            "(max_pixels of the client)."
        )
    image.draft("RGB", (max(1, width // 8), max(1, height // 8)))  # a JPEG at an eighth: much cheaper
    black = _is_black(image)
    if black and image.size != (width, height):
        black = _is_black(_open(data, found))  # at an eighth a bright speck is averaged away
    return width, height, black


class _PlainJpeg(JpegImageFile):
    """A JPEG read without its EXIF block, which Pillow reads for the resolution, with a warning if it is corrupt."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


def _recognize(data: bytes) -> _KnownFormat | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(_PNG_SIGNATURE):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return None


def _open(data: bytes, found: _KnownFormat) -> ImageFile:
    # Decoders are called directly: Image.open warns of large images by a process-wide limit, and mistakes a JPEG with
    # an embedded preview for another format.
    if found == "jpeg":
        return _PlainJpeg(io.BytesIO(data))
    if found == "png":
        return PngImageFile(_png_image(data))
    if found == "webp":
        return WebPImageFile(io.BytesIO(data))
    return GifImageFile(io.BytesIO(data))


def _png_image(data: bytes) -> io.BytesIO:
    """Copy a PNG without its metadata, verifying checksums and the end marker.

    Pillow rejects a valid image with long text chunks, and accepts one without an end marker.
    """
    view = memoryview(data)
    kept: list[bytes | memoryview] = [_PNG_SIGNATURE]
    start = len(_PNG_SIGNATURE)
    while start + 12 <= len(view):  # length, kind and checksum of a chunk
        length, kind = _PNG_HEADER.unpack_from(view, start)
        end = start + 12 + length
        if end > len(view):
            break
        if kind in _PNG_IMAGE:
            if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
                raise ValueError(f"checksum of {kind.decode('ascii')} is wrong")
            kept.append(view[start:end])
        if kind == b"IEND":
            return io.BytesIO(b"".join(kept))
        start = end
    raise ValueError("image file is truncated")


def _is_black(image: ImageFile) -> bool:
    image.load()
    if image.mode.startswith("I"):  # 16 bits a sample
        return _brightest(image) <= _BLACK_LEVEL * 257
    image.info.pop("transparency", None)  # Pillow would warn that RGB can't represent it
    return _brightest(image if image.mode in {"L", "RGB"} else image.convert("RGB")) <= _BLACK_LEVEL


def _brightest(image: Image.Image) -> float:
    low_and_high = [band.getextrema() for band in image.split()]
    return max(float(high) for _, high in low_and_high if not isinstance(high, tuple))


def _describe(data: bytes) -> str:
    if not data:
        return "an empty file"
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<!doctype html") or b"<html" in start:
        return "a page of HTML"
    if start.startswith(b"<"):
        return "XML"
    if start.startswith((b"{", b"[")):
        return "JSON"
    text = data[:80].decode("ascii", errors="replace")
    if text.replace("\n", " ").isprintable() and "\ufffd" not in text:
        return f"text ({text!r})"
    return f"no image format known here (it starts with {data[:8].hex(' ')})"
