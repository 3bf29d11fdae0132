"""Thumbnails: their size, their content and their sources."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest
from PIL import Image
from support.images import answer, draw, fake_published_image, publish

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.thumbnails import MOST_BYTES, draw_thumbnail, make_thumbnails
from flux_prefect.errors import ImageTooLarge
from flux_prefect.host.spool import Spool


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _shade(uri: str | None) -> float:
    assert uri is not None
    head, _, encoded = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    low = _open(base64.b64decode(encoded)).convert("L").getpixel((0, 0))
    assert isinstance(low, int)
    return low


@pytest.mark.parametrize("size", [(2336, 1000), (1000, 2336), (1024, 1024), (40, 20)])
def test_a_thumbnail_is_small_and_keeps_the_aspect_ratio(size: tuple[int, int]) -> None:
    """At most 160 pixels a side, never larger than the image."""
    width, height = _open(draw_thumbnail(draw(90, size))).size
    assert max(width, height) == min(160, max(size))
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)


def test_noise_stays_within_the_bound_in_bytes() -> None:
    """No image compresses worse."""
    noise = Image.frombytes("RGB", (160, 160), os.urandom(160 * 160 * 3))
    stream = io.BytesIO()
    noise.save(stream, "PNG")
    assert len(draw_thumbnail(stream.getvalue())) <= MOST_BYTES


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_is_drawn(mode: str) -> None:
    """In RGB, with white for transparent areas."""
    stream = io.BytesIO()
    image = Image.new("RGBA", (30, 30), (0, 0, 0, 0)) if mode == "RGBA" else Image.new(mode, (30, 30))
    image.save(stream, "JPEG" if mode == "CMYK" else "PNG")
    thumbnail = _open(draw_thumbnail(stream.getvalue()))
    assert thumbnail.mode == "RGB"
    if mode == "RGBA":
        assert thumbnail.getpixel((0, 0)) == (255, 255, 255)


def test_an_image_over_the_limit_is_not_decoded() -> None:
    """Its header is enough to refuse it."""
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    with pytest.raises(ImageTooLarge, match="9000 x 9000"):
        draw_thumbnail(stream.getvalue())


async def test_an_image_in_the_spool_is_not_read_from_the_bucket(bucket: ImageBucket, tmp_path: Path) -> None:
    """If its bytes are those that were published."""
    spool, request = Spool(tmp_path / "spool"), ImageRequest(prompt="a fox", seed=1)
    spool.prepare()
    image = await publish(bucket, tmp_path, request, draw(40))
    spool.keep_generation(answer(request))
    spool.image_path(answer(request), 0).write_bytes(draw(40))
    nowhere = bucket.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    nowhere._client = None  # a copy shares its original's client; there is no other way to separate them

    (uri,) = await make_thumbnails([image], nowhere, spool)
    assert _shade(uri) == pytest.approx(40, abs=3)


async def test_a_missing_or_different_file_is_read_from_the_bucket(bucket: ImageBucket, tmp_path: Path) -> None:
    """The thumbnail always shows the published image."""
    spool, gone, other = Spool(tmp_path / "spool"), *(ImageRequest(prompt="a fox", seed=seed) for seed in (1, 2))
    spool.prepare()
    images = [await publish(bucket, tmp_path, gone, draw(40)), await publish(bucket, tmp_path, other, draw(200))]
    spool.keep_generation(answer(other))
    spool.image_path(answer(other), 0).write_bytes(draw(120))

    shades = [_shade(uri) for uri in await make_thumbnails(images, bucket, spool)]
    assert shades == [pytest.approx(40, abs=3), pytest.approx(200, abs=3)]


async def test_an_image_that_can_not_be_read_does_not_affect_the_others(bucket: ImageBucket, tmp_path: Path) -> None:
    """Its thumbnail is None."""
    good, bad, gone = (ImageRequest(prompt="a fox", seed=seed) for seed in (1, 2, 3))
    images = [
        await publish(bucket, tmp_path, bad, b"\xff\xd8\xff no image"),
        fake_published_image(bucket, gone),
        await publish(bucket, tmp_path, good, draw(40)),
    ]
    first, second, third = await make_thumbnails(images, bucket, Spool(tmp_path / "spool"))
    assert (first, second) == (None, None)
    assert third is not None
