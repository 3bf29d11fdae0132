from __future__ import annotations

import hashlib
import io
import itertools
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from flux_prefect.api.images import ExpectedShape, InspectedImage, inspect_image
from flux_prefect.api.models import GeneratedImage, ImageRequest, OutputFormat
from flux_prefect.errors import BrokenImage, ImageTooLarge, NotAnImage, UnexpectedFormat, UnexpectedSize
from flux_prefect.sandbox.schema import SIZES

Inspect = Callable[[bytes, OutputFormat], InspectedImage]


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    """Inspect these bytes, as a file."""

    def run(data: bytes, expected: OutputFormat) -> InspectedImage:
        path = tmp_path / "image"
        path.write_bytes(data)
        image = inspect_image(path, expected, max_pixels=1_000_000)
        assert path.read_bytes() == data
        return image

    return run


def _save(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _insert(png: bytes, chunk: bytes) -> bytes:
    return png[:33] + chunk + png[33:]  # behind the header


def test_a_whole_jpeg_is_measured(inspect: Inspect, jpeg: bytes) -> None:
    """Format, type and size are those of the bytes."""
    assert inspect(jpeg, "jpeg") == InspectedImage(
        format="jpeg",
        content_type="image/jpeg",
        width=96,
        height=64,
        sha256=hashlib.sha256(jpeg).hexdigest(),
        size=len(jpeg),
        black=False,
    )


def test_a_whole_png_is_measured(inspect: Inspect, png: bytes) -> None:
    """Format, type and size are those of the bytes."""
    assert inspect(png, "png") == InspectedImage(
        format="png",
        content_type="image/png",
        width=96,
        height=64,
        sha256=hashlib.sha256(png).hexdigest(),
        size=len(png),
        black=False,
    )


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>Not found", "a page of HTML"),
        (b"\xef\xbb\xbf\n <html>", "a page of HTML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML"),
        (b'{"message": "expired"}', "JSON"),
        (b"Request has expired", "text ('Request has expired')"),
        (b"%PDF-1.7\n\xff", "it starts with 25 50 44 46"),
        (b"\xff\xd8", "it starts with ff d8"),
        (b"RIFF\x00\x00\x00\x00WAVE", "it starts with 52 49 46 46"),
    ],
)
def test_what_is_no_image_is_called_by_its_name(inspect: Inspect, data: bytes, what: str) -> None:
    """The message names a page of HTML and an empty file differently."""
    with pytest.raises(NotAnImage) as refused:
        inspect(data, "jpeg")
    assert what in refused.value.message


@pytest.mark.parametrize("missing", [1, 2, 10, 200, 600])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_is_found(inspect: Inspect, missing: int, progressive: bool) -> None:  # noqa: FBT001 - a parameter
    """Also where only the end marker is missing, and where every scan has begun."""
    data = _save(Image.effect_noise((160, 120), 80), "JPEG", progressive=progressive)
    with pytest.raises(NotAnImage, match="cut or broken"):
        inspect(data[:-missing], "jpeg")


NOISE = Image.effect_noise((640, 400), 60).convert("RGB")


def _provenance(jpeg: bytes) -> bytes:
    """The JPEG with a C2PA manifest's segments (APP11, JUMBF), the way the service's family signs its images."""
    segment = b"\xff\xeb" + struct.pack(">H", 60_000) + b"JP\x00\x01" + bytes(range(256)) * 234 + bytes(90)
    return jpeg[:2] + segment + segment + jpeg[2:]


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WHOLE_JPEGS = {
    "baseline": _save(NOISE, "JPEG", quality=90),
    "best quality": _save(NOISE, "JPEG", quality=100, subsampling=0),
    "4:2:2": _save(NOISE, "JPEG", subsampling=1),
    "progressive": _save(NOISE, "JPEG", progressive=True),
    "grayscale": _save(NOISE.convert("L"), "JPEG"),
    "CMYK of Adobe": _save(NOISE.convert("CMYK"), "JPEG"),
    "RGB": _save(NOISE, "JPEG", keep_rgb=True),
    "restart markers": _save(NOISE, "JPEG", restart_marker_blocks=7),
    "progressive with restart markers": _save(NOISE, "JPEG", restart_marker_rows=1, progressive=True),
    "colour profile": _save(NOISE, "JPEG", icc_profile=SRGB),
    "EXIF orientation": _save(NOISE, "JPEG", exif=_turned(6)),
    "provenance": _provenance(_save(NOISE, "JPEG")),
    "long comment": _save(NOISE, "JPEG", comment=b"x" * 60_000),
    "fill bytes": _save(NOISE, "JPEG").replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
    "black": _save(Image.new("RGB", (640, 400)), "JPEG", optimize=True),
}


@pytest.mark.parametrize("kind", WHOLE_JPEGS)
@pytest.mark.parametrize("after", [b"", b"junk" * 1000, WHOLE_JPEGS["grayscale"]], ids=["alone", "junk", "another"])
def test_a_whole_jpeg_of_any_kind_is_taken(inspect: Inspect, kind: str, after: bytes) -> None:
    """A strict decoder refuses none of them, nor what follows their end, as with previews and depth maps."""
    image = inspect(WHOLE_JPEGS[kind] + after, "jpeg")
    assert (image.width, image.height, image.black) == (640, 400, kind == "black")


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (17, 33), (639, 399), (8, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_odd_size_is_taken(
    inspect: Inspect,
    size: tuple[int, int],
    mode: str,
    progressive: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Blocks that reach over the edge are not missing data."""
    image = NOISE.resize(size).convert(mode)
    assert inspect(_save(image, "JPEG", progressive=progressive), "jpeg").width == size[0]


DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {
    "64 KiB missing": lambda data, at: data[:at] + data[at + 65_536 :],
    "4 KiB missing": lambda data, at: data[:at] + data[at + 4096 :],
    "64 KiB twice": lambda data, at: data[:at] + data[at - 65_536 :],
    "second half zeroed": lambda data, at: data[:at] + bytes(len(data) - at),
    "second half zeroed but for the end marker": lambda data, at: data[:at] + bytes(len(data) - at - 2) + data[-2:],
    "cut, with an end marker": lambda data, at: data[:at] + b"\xff\xd9",
    "false end marker": lambda data, at: data[:at] + b"\xff\xd9" + data[at + 2 :],
}
DAMAGED = [kind for kind in WHOLE_JPEGS if kind not in {"fill bytes", "black"}]


@pytest.mark.parametrize(("kind", "damage"), list(itertools.product(DAMAGED, DAMAGE)))
def test_a_jpeg_with_a_hole_is_refused(inspect: Inspect, kind: str, damage: str) -> None:
    """Pillow takes nearly all of them, as it ignores libjpeg's warnings."""
    whole = WHOLE_JPEGS[kind]
    start = whole.rindex(b"\xff\xda") if "progressive" not in kind else whole.index(b"\xff\xda")
    damaged = DAMAGE[damage](whole, max(start + (len(whole) - start) // 2, 65_536 if damage == "64 KiB twice" else 0))
    with pytest.raises(BrokenImage, match="cut or broken"):
        inspect(damaged, "jpeg")


@pytest.mark.parametrize("missing", [1, 12, 13, 50, 200])
def test_a_cut_png_is_found(inspect: Inspect, png: bytes, missing: int) -> None:
    """Also where only the end chunk is missing."""
    with pytest.raises(NotAnImage, match="cut or broken"):
        inspect(png[:-missing], "png")


def test_a_png_with_a_flipped_bit_is_found(inspect: Inspect, png: bytes) -> None:
    """Its checksums are verified."""
    middle = len(png) // 2
    with pytest.raises(NotAnImage, match="checksum of IDAT"):
        inspect(png[:middle] + bytes([png[middle] ^ 1]) + png[middle + 1 :], "png")


def _png(pixels: bytes, *, interlaced: bool = False, width: int = 64, height: int = 48) -> bytes:
    """A grayscale PNG of these filtered rows, in several IDAT chunks with right checksums."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    pieces = [pixels[start : start + 500] for start in range(0, len(pixels), 500)]
    chunks = [_chunk(b"IHDR", header), *(_chunk(b"IDAT", piece) for piece in pieces), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _rows(width: int, height: int) -> bytes:
    noise = Random(width * height)  # noqa: S311 - fills an image
    return b"".join(b"\x00" + noise.randbytes(width) for _ in range(height))


def _interlaced_rows() -> bytes:
    passes = [(8, 6), (8, 6), (16, 6), (16, 12), (32, 12), (32, 24), (64, 24)]  # of 64 x 48 pixels
    return b"".join(_rows(width, height) for width, height in passes)


@pytest.mark.parametrize(("rows", "interlaced"), [(_rows(64, 48), False), (_interlaced_rows(), True)])
def test_a_png_with_a_hole_is_refused(inspect: Inspect, rows: bytes, interlaced: bool) -> None:  # noqa: FBT001 - a parameter
    """Also where every checksum is right, and where the compressed data end early as if they were whole."""
    packed = zlib.compress(rows)
    whole = _png(packed, interlaced=interlaced)
    assert inspect(whole, "png").width == 64
    for damaged in (
        packed[:700] + packed[1200:],
        packed[:700] + bytes(500) + packed[1200:],
        packed[:700] + bytes(len(packed) - 700),
        packed[:700],
        zlib.compress(rows[: len(rows) // 2]),
        zlib.compress(rows[:-65]),  # the last row
    ):
        with pytest.raises(BrokenImage, match="cut or broken"):
            inspect(_png(damaged, interlaced=interlaced), "png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_png_whose_last_rows_are_zero_is_whole(inspect: Inspect, mode: str) -> None:
    """Black, or transparent, down there, but not missing."""
    image = Image.new("L", (33, 21))
    image.paste(255, (0, 0, 33, 9))
    assert inspect(_save(image.convert(mode), "PNG"), "png").height == 21


@pytest.mark.parametrize("form", ["WEBP", "GIF", "PNG"])
def test_a_whole_image_of_another_format_is_not_taken_for_a_broken_one(inspect: Inspect, form: str) -> None:
    """It was paid for and can be used, so it has its own error."""
    with pytest.raises(UnexpectedFormat, match=f"{form} where output_format asked for JPEG"):
        inspect(_save(Image.new("RGB", (8, 8), "red"), form), "jpeg")


def test_a_cut_image_of_another_format_is_just_broken(inspect: Inspect, png: bytes) -> None:
    """Only a whole one is worth keeping."""
    with pytest.raises(NotAnImage):
        inspect(png[:-20], "jpeg")


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_too_many_pixels_are_found_in_the_header(inspect: Inspect, form: str) -> None:
    """Before anything is decoded: the pixels of this one are not even there."""
    data = bytearray(_save(Image.new("L", (16, 16)), form))
    if form == "PNG":
        header = struct.pack(">II", 60_000, 60_000) + bytes(data[24:29])
        data[8:33] = _chunk(b"IHDR", header)
    else:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(ImageTooLarge, match="60000 x 60000 pixels, over the limit of 1,000,000"):
        inspect(bytes(data), "png" if form == "PNG" else "jpeg")


def test_pillows_own_limit_is_left_alone(inspect: Inspect, monkeypatch: pytest.MonkeyPatch, png: bytes) -> None:
    """An application's limit for its own images neither stops ours nor warns."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert inspect(png, "png").width == 96


@pytest.mark.parametrize(
    ("image", "black"),
    [
        (Image.new("RGB", (64, 64)), True),
        (Image.new("RGB", (64, 64), (8, 8, 8)), True),
        (Image.new("RGB", (64, 64), (9, 0, 0)), False),
        (Image.new("RGB", (64, 64), (0, 0, 60)), False),
        (Image.new("L", (64, 64)), True),
        (Image.new("1", (64, 64)), True),
        (Image.new("P", (64, 64)), True),
        (Image.new("RGBA", (64, 64), (0, 0, 0, 255)), True),
        (Image.new("RGBA", (64, 64), (200, 0, 0, 255)), False),
        (Image.new("I;16", (64, 64)), True),
        (Image.new("I;16", (64, 64), 60_000), False),
    ],
)
def test_a_blacked_out_png_is_seen(inspect: Inspect, image: Image.Image, black: bool) -> None:  # noqa: FBT001 - a parameter
    """Black is every sample at or below the threshold, in every mode."""
    assert inspect(_save(image, "PNG"), "png").black is black


def test_black_ink_on_a_transparent_ground_is_a_drawing(inspect: Inspect) -> None:
    """Also a wholly transparent image: the service's black ones are opaque."""
    ink = Image.new("RGBA", (64, 64))
    ink.paste((0, 0, 0, 255), (10, 10, 50, 50))
    palette = Image.new("P", (64, 64))
    palette.putpalette([0, 0, 0] * 2)
    palette.paste(1, (10, 10, 50, 50))
    assert not inspect(_save(ink, "PNG"), "png").black
    assert not inspect(_save(palette, "PNG", transparency=0), "png").black
    assert not inspect(_save(Image.new("LA", (64, 64)), "PNG"), "png").black
    assert inspect(_save(Image.new("LA", (64, 64), (0, 255)), "PNG"), "png").black


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_blacked_out_jpeg_is_seen(inspect: Inspect, mode: str) -> None:
    """With the noise that JPEG adds."""
    color = (0, 0, 0, 255) if mode == "CMYK" else 0
    assert inspect(_save(Image.new(mode, (1024, 640), color), "JPEG"), "jpeg").black


def test_one_bright_speck_makes_a_jpeg_not_black(inspect: Inspect) -> None:
    """A night sky with a star is an image."""
    sky = Image.new("RGB", (640, 640))
    sky.putpixel((317, 211), (255, 255, 255))
    assert not inspect(_save(sky, "JPEG", quality=95), "jpeg").black


def test_metadata_neither_stops_nor_warns(inspect: Inspect, jpeg: bytes, png: bytes) -> None:
    """Corrupt EXIF, a broken animation header, transparency and megabytes of text leave the image good."""
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x1a\x01\x05\x00\x01\x00\x00\x00\xff\xff\xff\x7f"
    with_exif = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([1, 2, 3] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect(with_exif, "jpeg").width == 96
        assert inspect(_insert(png, _chunk(b"acTL", bytes(8))), "png").width == 96
        assert inspect(_save(Image.new("RGB", (8, 8)), "PNG", pnginfo=text), "png").width == 8
        assert inspect(_save(palette, "PNG", transparency=b"\x00\x80\x20"), "png").width == 8


def test_a_jpeg_with_a_preview_in_it_is_a_jpeg(inspect: Inspect, jpeg: bytes) -> None:
    """Pillow would call it MPO."""
    data = _save(Image.new("RGB", (16, 16), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert inspect(data, "jpeg").width == 16
    assert inspect(jpeg + b"trailing bytes", "jpeg").width == 96


def test_many_threads_may_inspect_at_once(tmp_path: Path, jpeg: bytes, png: bytes) -> None:
    """None disturbs another."""
    files: list[tuple[Path, OutputFormat]] = [(tmp_path / "a.jpeg", "jpeg"), (tmp_path / "b.png", "png")]
    for (path, _), data in zip(files, (jpeg, png), strict=True):
        path.write_bytes(data)
    found: list[str] = []

    def run(number: int) -> None:
        path, expected = files[number % 2]
        found.extend(inspect_image(path, expected, max_pixels=10_000).format for _ in range(20))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["jpeg"] * 60 + ["png"] * 60


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(["jpeg", "png"]), at=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=40))
def test_no_broken_file_breaks_the_inspection(
    tmp_path: Path, jpeg: bytes, png: bytes, form: OutputFormat, at: int, junk: bytes
) -> None:
    """Overwritten anywhere, a file is an image or a typed error."""
    data = bytearray(jpeg if form == "jpeg" else png)
    at %= len(data)
    data[at : at + len(junk)] = junk
    path = tmp_path / "image"
    path.write_bytes(data)
    try:
        inspect_image(path, form, max_pixels=1_000_000)
    except (NotAnImage, ImageTooLarge, UnexpectedFormat):
        return


# The shape asked for


def _inspect_shape(path: Path, image: bytes, shape: ExpectedShape | None) -> None:
    path.write_bytes(image)
    inspect_image(path, "jpeg", max_pixels=10_000_000, shape=shape)


def _shape(announced: tuple[int, int] | None = None, **request: Any) -> ExpectedShape | None:
    width, height = announced or (None, None)
    image = GeneratedImage(index=0, url="https://example.com/0.jpg", width=width, height=height)
    return ExpectedShape.of(ImageRequest(prompt="a lighthouse", seed=1, **request), image)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (_shape((1568, 672), aspect_ratio="21:9"), (120, 90)),
        (_shape((1568, 672), aspect_ratio="21:9"), (672, 1568)),
        (_shape((1184, 880), aspect_ratio="16:9"), (1392, 752)),
        (_shape(aspect_ratio="21:9"), (120, 90)),
        (_shape(aspect_ratio="21:9"), (1024, 1024)),
        (_shape(aspect_ratio="1:1"), (90, 90)),
        (_shape(model="flux/dev", image_size="1024x768"), (512, 384)),
        (_shape(model="blackforestlabs/flux-2-edit", image_size="1024x768"), (880, 1184)),
        (_shape(model="flux/schnell"), (120, 90)),
        (_shape(model="flux/dev", image_size="portrait_4_3"), (1024, 768)),
    ],
)
def test_an_image_of_another_shape_is_refused(tmp_path: Path, shape: ExpectedShape, size: tuple[int, int]) -> None:
    """Such as a placeholder. The announced size counts, else the requested one; the message has both."""
    with pytest.raises(UnexpectedSize, match=rf"{size[0]} x {size[1]} pixels where .* (announced|asked for) \d"):
        _inspect_shape(tmp_path / "image", _save(Image.new("L", size, 99), "JPEG"), shape)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (_shape((1568, 672), aspect_ratio="21:9"), (1568, 672)),
        (_shape((1184, 880), aspect_ratio="16:9"), (1184, 880)),  # an edit, in the service's documents
        (_shape((1000, 750)), (1024, 768)),
        (_shape(model="flux-pro/v1.1-ultra", aspect_ratio="16:9"), (2752, 1536)),  # in the service's documents
        (_shape(model="flux/kontext-max/image-to-image"), (1184, 880)),
        (_shape(model="flux/dev", image_size="portrait_16_9"), (576, 1024)),
        (None, (3, 5)),
        (_shape(model="blackforestlabs/flux-2-edit"), (880, 1184)),
        (_shape(model="blackforestlabs/flux-2-edit", image_size="square"), (880, 1184)),
        (_shape(model="another/model", aspect_ratio="21:9", extra_fields={}), (512, 512)),
    ],
)
def test_an_image_of_the_shape_is_taken(tmp_path: Path, shape: ExpectedShape | None, size: tuple[int, int]) -> None:
    """With the service's rounding."""
    _inspect_shape(tmp_path / "image", _save(Image.new("L", size, 99), "JPEG"), shape)


def test_each_ratio_fits_its_own_size_alone() -> None:
    """No known size of one ratio passes for another ratio."""
    for ratio, other in itertools.product(SIZES, SIZES):
        shape = _shape(aspect_ratio=ratio)
        assert shape is not None
        assert shape.fits(*SIZES[other]) is (ratio == other)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_that_exif_turns_has_the_shape_in_which_it_is_shown(tmp_path: Path, form: str) -> None:
    """Its width and height are reported as they are stored."""
    path = tmp_path / "image"
    path.write_bytes(_save(Image.new("L", (336, 784), 99), form, exif=_turned(6)))
    expected: OutputFormat = "png" if form == "PNG" else "jpeg"
    image = inspect_image(path, expected, max_pixels=10_000_000, shape=_shape(aspect_ratio="21:9"))
    assert (image.width, image.height) == (336, 784)
    path.write_bytes(_save(Image.new("L", (336, 784), 99), form, exif=_turned(3)))
    with pytest.raises(UnexpectedSize):
        inspect_image(path, expected, max_pixels=10_000_000, shape=_shape(aspect_ratio="21:9"))
