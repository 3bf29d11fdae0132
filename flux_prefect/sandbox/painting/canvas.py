"""An image in the making: smooth-edged shapes, gradients, glows and grain over Pillow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from random import Random

from PIL import Image, ImageChops, ImageDraw

from flux_prefect.sandbox.painting.palettes import Colour

__all__ = ["Canvas", "Point", "Shape", "circle"]

_SMOOTHING = 3
"""Shapes are drawn this many times larger and reduced: that is what makes their edges smooth."""

Point = tuple[float, float]
Shape = Sequence[Point]


class Canvas:
    """An RGB image and the chance that composes it.

    Lengths are pixels; `unit` is a hundredth of the side of a square of the same area, so that compositions
    keep their proportions in every aspect ratio.
    """

    def __init__(self, size: tuple[int, int], chance: Random) -> None:
        self.width, self.height = size
        self.unit = math.sqrt(self.width * self.height) / 100
        self.chance = chance
        self.image = Image.new("RGB", size)

    def fill(self, colours: Sequence[Colour]) -> None:
        """Cover everything with a gradient from top to bottom."""
        self.image.paste(_gradient(colours, self.image.size))

    def shapes(self, outlines: Iterable[Shape], colours: Sequence[Colour], opacity: float = 1) -> None:
        """Polygons in one colour, or in one gradient from their common top to bottom."""
        outlines = list(outlines)
        if not outlines:
            return
        every_x = [x for outline in outlines for x, _ in outline]
        every_y = [y for outline in outlines for _, y in outline]
        left, top = max(math.floor(min(every_x)), 0), max(math.floor(min(every_y)), 0)
        right = min(math.ceil(max(every_x)) + 1, self.width)
        bottom = min(math.ceil(max(every_y)) + 1, self.height)
        if right <= left or bottom <= top:
            return
        size = right - left, bottom - top
        mask = Image.new("L", (size[0] * _SMOOTHING, size[1] * _SMOOTHING))
        draw = ImageDraw.Draw(mask)
        for outline in outlines:
            draw.polygon(
                [((x - left) * _SMOOTHING, (y - top) * _SMOOTHING) for x, y in outline], fill=round(255 * opacity)
            )
        self.image.paste(_gradient(colours, size), (left, top), mask.reduce(_SMOOTHING))

    def disc(self, centre: Point, radius: float, colours: Sequence[Colour], opacity: float = 1) -> None:
        """A filled circle."""
        self.shapes([circle(centre, radius)], colours, opacity)

    def glow(self, centre: Point, radius: float, colour: Colour, strength: float) -> None:
        """Light that fades out towards `radius`."""
        side = max(round(radius * 2), 2)
        # The curve makes the light fade like light, not like a cone.
        mask = _RADIAL.point([round(strength * 255 * max(1 - level / _RIM, 0) ** 2) for level in range(256)])
        corner = round(centre[0] - radius), round(centre[1] - radius)
        self.image.paste(colour, corner, mask.resize((side, side), Image.Resampling.BILINEAR))

    def shadow(self, centre: Point, radius: float, colour: Colour) -> None:
        """The night side of a globe that is lit from the upper left."""
        side = max(math.ceil(radius * 2), 4)
        globe = Image.new("L", (side * _SMOOTHING, side * _SMOOTHING))
        ImageDraw.Draw(globe).ellipse((0, 0, side * _SMOOTHING - 1, side * _SMOOTHING - 1), fill=255)
        night = Image.new("L", (side, side), 255)
        night.paste(_RADIAL.resize((side * 2, side * 2)), (round(-0.7 * side), round(-0.7 * side)))
        night = night.point([round(235 * min(max(level / _RIM - 0.36, 0) / 0.5, 1) ** 1.3) for level in range(256)])
        corner = round(centre[0] - radius), round(centre[1] - radius)
        self.image.paste(colour, corner, ImageChops.multiply(night, globe.reduce(_SMOOTHING)))

    def haze(self, top: float, bottom: float, colour: Colour, strength: float) -> None:
        """A veil that thickens from nothing at `top` to `strength` at `bottom`."""
        first, last = max(round(top), 0), min(round(bottom), self.height)
        if last <= first:
            return
        mask = Image.linear_gradient("L").resize((1, last - first)).resize((self.width, last - first))
        self.image.paste(colour, (0, first), mask.point([round(level * strength) for level in range(256)]))

    def grain(self, strength: int) -> None:
        """Film grain; it also hides the steps of long gradients."""
        noise = Image.frombytes("L", self.image.size, self.chance.randbytes(self.width * self.height))
        noise = noise.point([128 + round((level - 128) * strength / 128) for level in range(256)])
        self.image = ImageChops.soft_light(self.image, Image.merge("RGB", (noise, noise, noise)))

    def vignette(self, strength: float) -> None:
        """Darken the corners a little."""
        mask = _RADIAL.point([round(strength * 255 * max(level / 255 - 0.35, 0) ** 1.6) for level in range(256)])
        self.image.paste((0, 0, 0), (0, 0), mask.resize(self.image.size, Image.Resampling.BILINEAR))

    def columns(self, step: float) -> list[float]:
        """Places from the left edge to beyond the right one, about `step` units apart."""
        count = math.ceil(self.width / (step * self.unit)) + 1
        return [index * self.width / (count - 1) for index in range(count)]

    def ground(self, line: Sequence[Point]) -> Shape:
        """The area below a line from left to right."""
        return [*line, (self.width + 1, self.height + 1), (-1, self.height + 1)]


_RADIAL = Image.radial_gradient("L")
_RIM = 180
"""The radial gradient's level where its circle touches the square; 255 is only in the corners."""


def circle(centre: Point, radius: float, *, squash: float = 1, tilt: float = 0) -> Shape:
    """An ellipse's outline: `squash` is its height to its width, `tilt` turns it, in radians."""
    corners = 96
    cosine, sine = math.cos(tilt), math.sin(tilt)
    outline = []
    for corner in range(corners):
        angle = 2 * math.pi * corner / corners
        x, y = radius * math.cos(angle), radius * squash * math.sin(angle)
        outline.append((centre[0] + x * cosine - y * sine, centre[1] + x * sine + y * cosine))
    return outline


def _gradient(colours: Sequence[Colour], size: tuple[int, int]) -> Image.Image:
    if len(colours) == 1:
        return Image.new("RGB", size, colours[0])
    stops = Image.new("RGB", (1, len(colours)))
    stops.putdata(list(colours))
    # Stretching a pixel column between the centres of the first and the last stop, and only then sideways.
    column = stops.resize((1, size[1]), Image.Resampling.BILINEAR, box=(0, 0.5, 1, len(colours) - 0.5))
    return column.resize(size, Image.Resampling.NEAREST)
