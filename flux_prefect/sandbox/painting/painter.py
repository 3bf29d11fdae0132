"""From a request to the bytes of an image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageOps

from flux_prefect.sandbox.painting.canvas import Canvas
from flux_prefect.sandbox.painting.caption import write_caption
from flux_prefect.sandbox.painting.palettes import PALETTES
from flux_prefect.sandbox.painting.scenes import choose_scene
from flux_prefect.sandbox.schema import GenerationBody

__all__ = ["encode", "paint", "paint_black"]


def paint(request: GenerationBody, index: int, references: Sequence[bytes] = ()) -> bytes:
    """Draw image number `index` of a request with a seed, in the format that it asks for.

    The same request gives the same bytes every time (with one version of Pillow). Takes about 100 ms of CPU a
    megapixel. An edit shows its reference images, whole and side by side, before the scene that its prompt describes.
    """
    chance = Random(request.digest(index))  # noqa: S311 - composes an image
    canvas = Canvas(request.size, chance)
    scene = choose_scene(request.prompt, chance)
    scene(canvas, chance.choice(PALETTES))
    canvas.vignette(0.5)
    _mount(canvas.image, references)
    # Noise is what a PNG can't compress: it gets less.
    canvas.grain(3 if request.format == "png" else 9)
    number = f" · {index + 1} of {request.images}" if request.images > 1 else ""
    write_caption(canvas.image, request.prompt, f"seed {request.seed}{number}")
    return encode(canvas.image, request.format)


def paint_black(request: GenerationBody) -> bytes:
    """What the service delivers in place of an image that it withholds."""
    return encode(Image.new("RGB", request.size), request.format)


def encode(image: Image.Image, output_format: str) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    if output_format == "png":
        image.save(file, "PNG", compress_level=1)
    elif output_format == "webp":
        image.save(file, "WEBP", quality=90, method=0)
    else:
        image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _mount(image: Image.Image, references: Sequence[bytes]) -> None:
    """Show the references in the middle of an image, side by side, each in a white frame."""
    for place, content in enumerate(references):
        with Image.open(io.BytesIO(content)) as reference:
            room = max(round(image.width * 0.8 / len(references)), 1), max(round(image.height * 0.55), 1)
            shown = ImageOps.contain(reference.convert("RGB"), room)
        framed = ImageOps.expand(shown, max(image.width // 200, 1), "white")
        centre = round(image.width * (0.1 + 0.8 * (place + 0.5) / len(references)))
        image.paste(framed, (centre - framed.width // 2, round(image.height * 0.4) - framed.height // 2))
