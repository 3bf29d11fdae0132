"""The line at an image's foot that says what was asked for."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw, ImageFont

__all__ = ["write_caption"]

_LINES = 2


def write_caption(image: Image.Image, prompt: str, note: str) -> None:
    """Write the prompt, at most two lines of it, and a smaller note below, over a soft shade."""
    width, height = image.size
    size = max(round((width * height) ** 0.5 * 0.024), 11)
    margin = round(size * 1.3)
    large, small = _font(size), _font(round(size * 0.74))
    lines = _wrap(prompt, large, width - 2 * margin)
    line_height, note_height = round(size * 1.32), round(size * 1.1)
    text_height = line_height * len(lines) + note_height
    top = height - margin - text_height
    shade = (
        Image.linear_gradient("L")
        .resize((1, height - top + 3 * size))
        .point([round(level * 0.86) for level in range(256)])
    )
    image.paste((8, 8, 14), (0, top - 3 * size), shade.resize((width, shade.height)))
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((margin, top + number * line_height), line, font=large, fill=(255, 255, 255))
    draw.text((margin, top + len(lines) * line_height + round(size * 0.2)), note, font=small, fill=(214, 214, 222))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _wrap(prompt: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> list[str]:
    # A line's worth of words is looked at, not all 4,000 characters.
    words = "".join(letter if letter.isprintable() else " " for letter in prompt[:600]).split()
    lines: list[str] = []
    while words and len(lines) < _LINES:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= room:
            line = f"{line} {words.pop(0)}"
        if words and len(lines) == _LINES - 1:
            line += "…"
        lines.append(_shorten(line, font, room))
    return lines


def _shorten(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    while font.getlength(line) > room:
        line = f"{line[: -max(len(line) // 20, 2)].rstrip()}…"
    return line
