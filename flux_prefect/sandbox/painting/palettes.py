"""Colours that go together, and the arithmetic on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageColor

__all__ = ["PALETTES", "Colour", "Palette", "along", "mix"]

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Palette:
    """One mood: a sky from top to horizon, a light, the nearest dark, and some accents."""

    sky: tuple[Colour, ...]
    light: Colour
    dark: Colour
    accents: tuple[Colour, ...]

    @property
    def horizon(self) -> Colour:
        """The sky's lowest colour, which is also the haze's."""
        return self.sky[-1]


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with a share, 0 to 1, of `second`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def along(colours: Sequence[Colour], place: float) -> Colour:
    """The colour at `place`, 0 to 1, of an even gradient through all of them."""
    position = min(max(place, 0), 1) * (len(colours) - 1)
    step = min(int(position), len(colours) - 2)
    return mix(colours[step], colours[step + 1], position - step)


def _palette(sky: str, light: str, dark: str, accents: str) -> Palette:
    return Palette(
        sky=tuple(_colour(code) for code in sky.split()),
        light=_colour(light),
        dark=_colour(dark),
        accents=tuple(_colour(code) for code in accents.split()),
    )


def _colour(code: str) -> Colour:
    red, green, blue = ImageColor.getrgb(f"#{code}")[:3]
    return red, green, blue


PALETTES = (
    _palette("22305a 6a4c82 e0777d ffc89a", "fff0c9", "171a33", "e0777d ffb27a f4e3c1 3f5e8c 6a4c82"),
    _palette("0f2a43 1f5f7a 7fb7b2 f6e3c0", "fff6dc", "0a1c2b", "e9724c f4b860 f6e3c0 2f8f9d 1f5f7a"),
    _palette("2b1b3d 7b2d5b d8504f ffb55a", "ffe9b0", "160d22", "d8504f ffb55a ffe0a3 5b3a8c 2f6f8f"),
    _palette("8ec5d6 bfe0df f3ecd2 fbd9b0", "fffbe8", "29485a", "ee8a6a f7c873 7fb09a 3f7488 fbeed6"),
    _palette("0b1026 1a2a5e 3f5aa6 a9b8e8", "f3f4ff", "060917", "f2c14e 7f8fe0 e07a9a 4fb3bf d8def8"),
    _palette("f3d9c9 f0bfa5 e58f7b c8657a", "fff4e0", "3c1f3a", "c8657a f0bfa5 7a4a78 f6e7d2 e0a458"),
    _palette("123b3a 2c6e63 86b98f efe9c4", "fffbe0", "0b2222", "e3b24f d96f4a efe9c4 5a9a86 2c6e63"),
    _palette("d7e3ea c3d3de efd9cf f7c9b6", "ffffff", "33424f", "e28f7e 6f8fa8 f3d39b 9fb9a8 47586a"),
    _palette("1d1a3a 43306e a04f8f f58f8f", "ffe1d6", "100e22", "f58f8f ffd08a 6fd0c5 7a5fc0 fbe8df"),
    _palette("f2e6cf ecd3a2 e3ab6b d2773f", "fffaf0", "43231b", "d2773f 2f6d76 e3c16b 8f3f35 f6ead2"),
)
