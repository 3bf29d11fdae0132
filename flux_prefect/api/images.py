"""Inspection of image files by their bytes alone, not by name or content type."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from PIL import ExifTags, Image, ImageChops
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import GeneratedImage, ImageRequest, ImageSize, OutputFormat, SizePreset
from flux_prefect.api.registry import MODELS, TextToImageModel
from flux_prefect.errors import BrokenImage, ImageTooLarge, NotAnImage, UnexpectedFormat, UnexpectedSize

__all__ = ["ExpectedShape", "InspectedImage", "inspect_image", "open_image", "read_orientation"]

_QUARTER_TURNS = {5, 6, 7, 8}  # EXIF orientations

_SIZE_STEP = 32
"""Pixels by which a side may differ from the announced one: the service's documents round sizes to multiples of it."""

_RATIO_TOLERANCE = 0.05
"""How far an image's ratio may be from the requested one. The service rounds: 21:9 comes as 1568 x 672 (exact), 16:9 as
2752 x 1536 from one model (0.8 % off) and as 1392 x 752 from the Kontext ones (4.1 % off, the most known). The two
nearest ratios, 4:3 and 3:2, are 12.5 % apart, so none passes for another."""

_LEAST_SIDE = 256
"""Pixels. Where only a ratio is asked for, the service's smallest known image has 672; a placeholder has about 100."""

_BLACK_LEVEL = 8
"""The brightest sample, of 255, that an image delivered black may have. Allows for JPEG noise."""

_PRESETS: dict[SizePreset, tuple[int, int]] = {
    "square_hd": (1, 1),
    "square": (1, 1),
    "portrait_4_3": (3, 4),
    "portrait_16_9": (9, 16),
    "landscape_4_3": (4, 3),
    "landscape_16_9": (16, 9),
}
"""Width to height."""

_KnownFormat = Literal["jpeg", "png", "webp", "gif"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER = struct.Struct(">I4s")
_PNG_SIZE = struct.Struct(">IIBB2xB")  # IHDR: width, height, bits a sample, colour type, and the interlacing
_INFLATED = 1024 * 1024  # bytes, at a time
_LONGEST_PROFILE = 1024 * 1024  # bytes; Pillow refuses a PNG with a longer one
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # a pixel, by colour type
_PNG_PASSES = (  # of an interlaced image: first column and row, distance of columns and rows
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # chunks that define the pixels; the others are metadata


class InspectedImage(BaseModel):
    """Properties of a complete, decodable image file."""

    model_config = ConfigDict(frozen=True)

    format: OutputFormat = Field(description="The format of the bytes.")
    content_type: str = Field(description="The MIME type of the bytes.")
    width: int = Field(gt=0, description="Pixels, as stored: an EXIF orientation may turn the image when it is shown.")
    height: int = Field(gt=0, description="Pixels, as stored: an EXIF orientation may turn the image when it is shown.")
    sha256: str = Field(description="Of the bytes, hex.")
    size: int = Field(gt=0, description="Bytes.")
    black: bool = Field(
        description=(
            "Whether every pixel is black and opaque: so the service delivers an image that its safety filter blocked."
        )
    )


@dataclass(frozen=True)
class ExpectedShape:
    """The shape that an image must have.

    Attributes:
        width: Pixels, or the first part of a ratio.
        height: Pixels, or the second part of a ratio.
        source: Where they are from, for messages.
        is_ratio: Whether only the ratio counts, as the service chooses the size.
    """

    width: int
    height: int
    source: str
    is_ratio: bool

    @classmethod
    def of(cls, request: ImageRequest, image: GeneratedImage) -> ExpectedShape | None:
        """The shape of one image of an answer: the announced size, else the requested one. None if neither is known.

        A ratio or a preset asked of an edit does not count: the service's own sample of 16:9 has its reference's shape.
        Nor does what is asked of a model that is not in the registry, where a field may mean something else.
        """
        if (image.width or 0) > 0 and (image.height or 0) > 0:
            return cls(image.width or 0, image.height or 0, "the service announced", is_ratio=False)
        size = request.image_size if request.model in MODELS else None
        if isinstance(size, ImageSize):
            return cls(size.width, size.height, "image_size asked for", is_ratio=False)
        if request.model not in get_args(TextToImageModel):
            return None
        if size is not None:
            return cls(*_PRESETS[size], "image_size asked for", is_ratio=True)
        width, height = map(int, (request.aspect_ratio or "0:0").split(":"))
        return cls(width, height, "aspect_ratio asked for", is_ratio=True) if width else None

    def fits(self, width: int, height: int) -> bool:
        """Whether an image of this size has the shape."""
        if not self.is_ratio:
            return max(abs(width - self.width), abs(height - self.height)) <= _SIZE_STEP
        off = abs(math.log(width / height * self.height / self.width))
        return off <= math.log1p(_RATIO_TOLERANCE) and min(width, height) >= _LEAST_SIDE

    def __str__(self) -> str:
        if self.is_ratio:
            return f"{self.source} {self.width}:{self.height}, with at least {_LEAST_SIDE} pixels a side"
        return f"{self.source} {self.width} x {self.height}"


def inspect_image(
    path: Path, expected: OutputFormat | None, *, max_pixels: int, shape: ExpectedShape | None = None
) -> InspectedImage:
    """Verify that a file is a complete image of the expected format and shape, and measure it. Reads the file once.

    The file is decoded to its end and strictly, so that a cut is detected, and a hole or zeros in the middle. Data of
    a JPEG that decode to wrong pixels without contradicting the rest (a flipped bit, zeros in the refining scans of a
    progressive one) can't be detected: the format has no checksum. The bytes are never changed. Takes about ten
    milliseconds for a JPEG of one megapixel, thirty for a PNG, and memory for the file and its pixels meanwhile: call
    it in a thread. Safe in many threads at once.

    Args:
        path: the file.
        expected: the requested format; None for any of them.
        max_pixels: the most pixels to decode, as a guard against decompression bombs.
        shape: the shape that it must have, as stored or as its EXIF orientation turns it; any if None.

    Raises:
        NotAnImage: the file is something else. The message describes it.
        BrokenImage: it starts as an image and is not a complete one.
        ImageTooLarge: more pixels than allowed. Detected in the header, before anything is decoded.
        UnexpectedFormat: a complete image in another format.
        UnexpectedSize: a complete image in another shape.
        OSError: the file can't be read.
    """
    data = path.read_bytes()
    found = _recognize(data)
    if found is None:
        raise NotAnImage(f"The file delivered as an image is {_describe(data)}.")
    try:
        image = _open(data, found)
        if image.width * image.height <= max_pixels:
            black = _decode(data, found, image)
    except MemoryError:
        raise
    except Exception as error:  # hostile bytes make the decoders raise nearly anything
        raise BrokenImage(
            f"The file delivered as an image starts as {found.upper()} but does not decode: it is cut or broken "
            f"({str(error) or type(error).__name__}, {len(data):,} bytes)."
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"The image delivered is {width} x {height} pixels, over the limit of {max_pixels:,} "
            "(max_pixels of the client)."
        )
    if found == "gif" or (expected is not None and found != expected):
        wanted = "JPEG, PNG or WEBP was expected" if expected is None else f"output_format asked for {expected.upper()}"
        raise UnexpectedFormat(f"The image delivered is {found.upper()} where {wanted}.")
    # A black one says that the service blocked it, whatever its shape.
    if (
        shape is not None
        and not black
        and not shape.fits(width, height)
        and not (shape.fits(height, width) and read_orientation(image) in _QUARTER_TURNS)
    ):
        raise UnexpectedSize(f"The image delivered is {width} x {height} pixels where {shape}.")
    return InspectedImage(
        format=found,
        content_type=f"image/{found}",
        width=width,
        height=height,
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        black=black,
    )


def open_image(data: bytes) -> ImageFile:
    """Open an image without decoding its pixels; `info` has its EXIF block and its colour profile.

    Raises:
        NotAnImage: it is something else.
        Exception: nearly any, for broken bytes; also later, from what decodes it.
    """
    found = _recognize(data)
    if found is None:
        raise NotAnImage(f"The file is {_describe(data)}.", retryable=False)
    return _open(data, found)


def read_orientation(image: ImageFile) -> int:
    """Read the EXIF orientation, 1 to 8; 1 if there is none."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation = int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - corrupt metadata of a good image
        return 1
    return orientation if 1 <= orientation <= 8 else 1  # noqa: PLR2004 - EXIF's values


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
        # Without most metadata: Pillow rejects a valid image with long text chunks.
        kept = (chunk for kind, chunk in _png_chunks(data) if kind in _PNG_PIXELS or _is_used(kind, chunk))
        return PngImageFile(io.BytesIO(b"".join((_PNG_SIGNATURE, *kept))))
    if found == "webp":
        return WebPImageFile(io.BytesIO(data))
    return GifImageFile(io.BytesIO(data))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The chunks of a PNG, verifying the checksums of its pixels, and its end marker, which Pillow does not."""
    view = memoryview(data)
    start = len(_PNG_SIGNATURE)
    while start + 12 <= len(view):  # length, kind and checksum of a chunk
        length, kind = _PNG_HEADER.unpack_from(view, start)
        end = start + 12 + length
        if end > len(view):
            break
        chunk = view[start:end]
        if kind in _PNG_PIXELS and not _has_its_checksum(chunk):
            raise ValueError(f"checksum of {kind.decode('ascii')} is wrong")
        yield kind, chunk
        if kind == b"IEND":
            return
        start = end
    raise ValueError("image file is truncated")


def _is_used(kind: bytes, chunk: memoryview) -> bool:
    """Whether a chunk is intact and says how the image is shown: its orientation or its colour profile."""
    if kind not in {b"eXIf", b"iCCP"} or not _has_its_checksum(chunk):
        return False
    if kind == b"eXIf":
        return True
    _, _, packed = bytes(chunk[8:-4]).partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(packed[1:], _LONGEST_PROFILE)
    except zlib.error:
        return False
    return inflate.eof


def _has_its_checksum(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _check_png_rows(data: bytes, image: Image.Image) -> None:
    """Verify that a PNG has data for all of its rows. Pillow leaves missing ones zero."""
    painted = image.getbbox(alpha_only=False)
    if painted is not None and painted[3] == image.height and not image.info.get("interlace"):
        return  # the last row came; inflating here costs more than Pillow's whole decoding
    width, height, bits, colours, interlaced = _PNG_SIZE.unpack_from(data, len(_PNG_SIGNATURE) + _PNG_HEADER.size)
    missing = 0
    for left, top, across, down in _PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        missing += rows * (1 + (columns * bits * _PNG_SAMPLES[colours] + 7) // 8) if columns > 0 else 0
    inflate = zlib.decompressobj()
    for kind, chunk in _png_chunks(data):
        packed: bytes | memoryview = chunk[8:-4] if kind == b"IDAT" else b""
        while packed and not inflate.eof and missing > -_INFLATED:
            missing -= len(inflate.decompress(packed, _INFLATED))
            packed = inflate.unconsumed_tail
    if missing > 0 or not inflate.eof:
        raise ValueError("image file is truncated: rows are missing")


def _decode(data: bytes, found: _KnownFormat, image: ImageFile) -> bool:
    """Decode an image to its end, and return whether it is black."""
    if found != "jpeg":
        image.load()
        if found == "png":
            _check_png_rows(data, image)
        return _is_black(image)
    # libjpeg goes on after most damage with a warning, which Pillow does not read. Imported here, as it loads NumPy: a
    # tenth of a second in each command that decodes nothing.
    from simplejpeg import decode_jpeg  # type: ignore[import-untyped] # noqa: PLC0415

    small = decode_jpeg(data, min_width=image.width // 8, min_height=image.height // 8)  # at an eighth: cheaper
    if image.mode == "CMYK":
        return _is_black(image)  # Pillow distinguishes the two ways to write it
    # At an eighth a bright speck is averaged away.
    return bool(small.max() <= _BLACK_LEVEL and decode_jpeg(data).max() <= _BLACK_LEVEL)


def _is_black(image: Image.Image) -> bool:
    if image.mode.startswith("I"):  # 16 bits a sample
        return _brightest(image) <= _BLACK_LEVEL * 257
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if _brightest(ImageChops.invert(image.getchannel("A"))) > _BLACK_LEVEL:
            return False  # black ink on a transparent ground is a drawing
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
