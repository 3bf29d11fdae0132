from __future__ import annotations

import hashlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from flux_prefect.api.images import InspectedImage, inspect_image
from flux_prefect.api.models import OutputFormat
from flux_prefect.errors import ImageTooLarge, NotAnImage, UnexpectedFormat

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
