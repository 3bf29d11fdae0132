from __future__ import annotations

import io
import time
from typing import get_args

import pytest
from PIL import Image, ImageStat

from flux_prefect.api.models import AspectRatio
from flux_prefect.sandbox.painting.painter import paint
from flux_prefect.sandbox.painting.prebuilt import stamp
from flux_prefect.sandbox.painting.scenes import SCENES
from flux_prefect.sandbox.schema import GenerationBody

from .plain_client import MODEL


def request(**fields: object) -> GenerationBody:
    """A request of the usual fields."""
    return GenerationBody.model_validate({"model": MODEL, "prompt": "A boat on the sea", "seed": 7, **fields})


@pytest.mark.parametrize("aspect_ratio", get_args(AspectRatio))
def test_the_size_follows_the_aspect_ratio(aspect_ratio: str) -> None:
    """About a megapixel, in steps of 16 pixels, close to the ratio; 21:9 as upstream."""
    wanted = request(aspect_ratio=aspect_ratio)
    with Image.open(io.BytesIO(paint(wanted, 0))) as image:
        width, height = image.size
    across, down = map(int, aspect_ratio.split(":"))
    assert (width, height) == wanted.size
    assert width % 16 == height % 16 == 0
    assert 0.97 <= width * height / 2**20 <= 1.03
    assert abs(width / height / (across / down) - 1) < 0.05
    if aspect_ratio == "21:9":
        assert (width, height) == (1568, 672)


@pytest.mark.parametrize("scene", SCENES)
def test_every_scene_is_drawn_and_drawn_alike_again(scene: object) -> None:
    """An image with something in it, the same bytes each time."""
    word = {"shapes": "geometric", "ribbons": "silk", "mountains": "mountain", "planets": "planet"}
    name = scene.__name__  # type: ignore[attr-defined] # scenes are functions
    prompt = word.get(name, name.removesuffix("s"))
    painted = paint(request(prompt=prompt), 0)
    assert paint(request(prompt=prompt), 0) == painted
    with Image.open(io.BytesIO(painted)) as image:
        assert min(ImageStat.Stat(image).stddev) > 8


@pytest.mark.parametrize("prompt", ["", "a" * 4000, "word " * 800, "\x00\x1b[31m\n\t", "海の上の小舟 🚤", "<b>&amp;"])
def test_any_prompt_can_be_captioned(prompt: str) -> None:
    """Long, empty, unprintable or foreign: the image is drawn."""
    assert paint(request(prompt=prompt, aspect_ratio="9:21"), 0)


def test_a_fast_image_costs_next_to_nothing() -> None:
    """Under a millisecond once the first was built."""
    stamp(request(), 0, 300_000)
    begin = time.perf_counter()
    for seed in range(1, 51):
        assert len(stamp(request(seed=seed), 0, 300_000)) >= 300_000
    assert (time.perf_counter() - begin) / 50 < 0.001
