"""What people see of images: upright, in true colours, whatever the file's kind; the file itself is untouched."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from support.image_kinds import CORNERS, KINDS, SIZE, paint, save, turned, with_profile
from support.images import publish

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.contact_sheets import Cell, ContactSheet
from flux_prefect.display.small_images import draw_small
from flux_prefect.display.thumbnails import draw_thumbnail

GRAY = {"grayscale", "16 bits"}


def _corners(image: Image.Image, box: tuple[int, int, int, int] | None = None) -> list[tuple[int, ...]]:
    left, top, right, bottom = box or (0, 0, *image.size)
    xs, ys = ((3 * left + right) // 4, (left + 3 * right) // 4), ((3 * top + bottom) // 4, (top + 3 * bottom) // 4)
    found = [image.getpixel((x, y)) for y in ys for x in xs]
    return [pixel for pixel in found if isinstance(pixel, tuple)]


def _check(image: Image.Image, kind: str, box: tuple[int, int, int, int] | None = None) -> None:
    expected: tuple[tuple[int, int, int], ...] = CORNERS
    if kind in GRAY:
        expected = tuple((round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for r, g, b in CORNERS)
    for found, meant in zip(_corners(image, box), expected, strict=True):
        assert found == pytest.approx(meant, abs=12), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_thumbnail_is_upright_and_in_true_colours(kind: str) -> None:
    """Of every kind of file that is published."""
    thumbnail = Image.open(io.BytesIO(draw_thumbnail(KINDS[kind])))
    assert thumbnail.size == pytest.approx((160, 160 * SIZE[1] / SIZE[0]), abs=1)
    _check(thumbnail, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_of_a_contact_sheet_is_upright_and_in_true_colours(kind: str) -> None:
    """As the thumbnail is."""
    sheet = ContactSheet("a title", 1, 1)
    sheet.add(Cell("a label", KINDS[kind]))
    image = Image.open(io.BytesIO(sheet.to_jpeg()))
    height = round(256 * SIZE[1] / SIZE[0])
    top = 34 + (256 - height) // 2
    _check(image, kind, (8, top, 8 + 256, top + height))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(orientation: int, form: str) -> None:
    """Mirrored ones as well."""
    _check(draw_small(turned(orientation, form), 160), "turned")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_colour_profile_is_applied(form: str) -> None:
    """Without it, red would be blue here."""
    _check(draw_small(with_profile(form), 160), "profile")
    plain = draw_small(save(paint(), form), 160)
    _check(plain, "plain")


@pytest.mark.parametrize("profile", [b"no profile", b""])
def test_a_profile_that_can_not_be_used_is_ignored(profile: bytes) -> None:
    """As browsers do; also one for another kind of pixels."""
    _check(draw_small(save(paint(), "PNG", icc_profile=profile), 160), "plain")


def test_transparent_areas_are_white_under_a_profile() -> None:
    """The profile is applied to the colours alone."""
    data = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    data.paste((0, 0, 0, 0), (0, 0, 64, 32))
    small = draw_small(save(data, "PNG", icc_profile=b"no profile"), 64)
    assert (small.getpixel((32, 8)), small.getpixel((32, 56))) == ((255, 255, 255), (200, 0, 0))


async def test_images_of_every_kind_are_published_byte_for_byte(bucket: ImageBucket, tmp_path: Path) -> None:
    """With orientation, profile and provenance."""
    for number, content in enumerate(KINDS.values(), start=1):
        image = await publish(bucket, tmp_path, ImageRequest(prompt="a fox", seed=number), content)
        assert await bucket.read_image(image) == content
