"""From a request to the bytes of an image."""

from __future__ import annotations

import io
from random import Random

from PIL import Image

from flux_prefect.sandbox.painting.canvas import Canvas
from flux_prefect.sandbox.painting.caption import write_caption
from flux_prefect.sandbox.painting.palettes import PALETTES
from flux_prefect.sandbox.painting.scenes import choose_scene
from flux_prefect.sandbox.schema import GenerationBody

__all__ = ["encode", "paint", "paint_black"]


def paint(request: GenerationBody, index: int) -> bytes:
    """Draw image number `index` of a request with a seed, in the format that it asks for.

    The same request gives the same bytes every time (with one version of Pillow). Takes about 100 ms of CPU.
    """
    chance = Random(request.digest(index))  # noqa: S311 - composes an image
    canvas = Canvas(request.size, chance)
    scene = choose_scene(request.prompt, chance)
    scene(canvas, chance.choice(PALETTES))
    canvas.vignette(0.5)
    # Noise is what a PNG can't compress: it gets less.
    canvas.grain(9 if request.output_format == "jpeg" else 3)
    number = f" · {index + 1} of {request.images}" if request.images > 1 else ""
    write_caption(canvas.image, request.prompt, f"seed {request.seed}{number}")
    return encode(canvas.image, request.output_format)


def paint_black(request: GenerationBody) -> bytes:
    """What the service delivers in place of an image that it withholds."""
    return encode(Image.new("RGB", request.size), request.output_format)


def encode(image: Image.Image, output_format: str) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    if output_format == "png":
        image.save(file, "PNG", compress_level=1)
    else:
        image.save(file, "JPEG", quality=90)
    return file.getvalue()
