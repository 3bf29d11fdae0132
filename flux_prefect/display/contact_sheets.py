"""Contact sheets: one image that shows many images in a grid, each with a label."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import anyio.to_thread
from PIL import Image, ImageDraw, ImageFont
from prefect.artifacts import acreate_markdown_artifact

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.progress import Logger
from flux_prefect.display.small_images import draw_small
from flux_prefect.manifest.records import ItemRecord

__all__ = ["Cell", "ContactSheet", "publish_contact_sheet", "publish_contact_sheets"]

_MARKDOWN = re.compile(r"([!-/:-@\[-`{-~])")  # all of ASCII's punctuation, any of which may be escaped

MAX_DATA_URI = 200 * 1024
"""The maximum length of a preview's `data:` URI, in characters."""

_LARGE, _SMALL = 256, 128  # pixels of a cell's longer side
_MOST_LARGE = 64
_WIDEST = 2048
_GAP, _LABEL, _TITLE = 8, 18, 34
_PAPER, _INK, _FAINT, _EMPTY = (250, 250, 248), (28, 28, 30), (110, 110, 116), (226, 226, 222)
_PREVIEWS = ((1024, 80), (1024, 60), (768, 60), (512, 60), (384, 50), (256, 40), (128, 30), (64, 30))


@dataclass(frozen=True)
class Cell:
    """One cell of a contact sheet.

    Attributes:
        label: the text below the image.
        image: the file's bytes; None where there is no image, in which case the label has the reason.
    """

    label: str
    image: bytes | None


class ContactSheet:
    """A contact sheet that is filled one image at a time, from left to right.

    Memory: the sheet's own pixels, at most about 60 MB for a thousand images. Not thread-safe.

    Args:
        title: the line above the images.
        cells: the number of images.
        columns: the number of images in a line, at most; fewer where the sheet would be too wide.
    """

    def __init__(self, title: str, cells: int, columns: int) -> None:
        self._side = _LARGE if cells <= _MOST_LARGE else _SMALL
        self._columns = max(1, min(columns, cells, (_WIDEST - _GAP) // (self._side + _GAP)))
        rows = math.ceil(cells / self._columns)
        width = max(_GAP + self._columns * (self._side + _GAP), 2 * _LARGE)
        self._image = Image.new("RGB", (width, _TITLE + rows * (self._side + _LABEL + _GAP) + _GAP), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._write((_GAP, _GAP), title, 17, _INK, width - 2 * _GAP)
        self._filled = 0

    def add(self, cell: Cell) -> None:
        """Fill the next cell. Takes about ten milliseconds for an image of a megapixel: call it in a thread.

        Raises:
            Exception: any error of `draw_small` for bytes that are not an image.
        """
        row, column = divmod(self._filled, self._columns)
        left, top = _GAP + column * (self._side + _GAP), _TITLE + row * (self._side + _LABEL + _GAP)
        if cell.image is None:
            self._draw.rectangle((left, top, left + self._side - 1, top + self._side - 1), fill=_EMPTY)
        else:
            image = draw_small(cell.image, self._side)
            room = (self._side - image.width) // 2, (self._side - image.height) // 2
            self._image.paste(image, (left + room[0], top + room[1]))
        self._write((left, top + self._side + 2), cell.label, 12, _FAINT, self._side)
        self._filled += 1

    def to_jpeg(self) -> bytes:
        """Encode the sheet as a JPEG file."""
        return _encode(self._image, 88)

    def to_data_uri(self) -> str:
        """Encode a preview for markdown as a `data:` URI of at most `MAX_DATA_URI` characters."""
        for side, quality in _PREVIEWS:
            preview = self._image.copy()
            preview.thumbnail((side, 4 * side))
            uri = f"data:image/jpeg;base64,{base64.b64encode(_encode(preview, quality)).decode('ascii')}"
            if len(uri) <= MAX_DATA_URI:
                break
        return uri

    def _write(self, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], room: int) -> None:
        font = _font(size)
        # Measure only as much text as can fit a line, not all 4,000 characters of a prompt.
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:400]).split())
        shown = line
        while shown and font.getlength(shown) > room:
            line = line[: -max(1, len(line) // 20)].rstrip()
            shown = f"{line}…"
        self._draw.text(place, shown, font=font, fill=colour)


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


async def publish_contact_sheets(
    records: Iterable[ItemRecord], bucket: ImageBucket, columns: int, logger: Logger
) -> dict[str, str]:
    """Publish the contact sheet of each prompt, and return their addresses by prompt.

    A sheet that can't be made or published is logged as a warning and left out: it never fails what was paid for.

    Args:
        records: the records; those of one prompt follow each other.
        bucket: the bucket of the images, and of the sheets.
        columns: the number of images in a line.
        logger: the run's logger.
    """
    sheets: dict[str, str] = {}
    for prompt, variants in itertools.groupby(records, key=_prompt_of):
        items = list(variants)
        try:
            sheets[prompt] = await publish_contact_sheet(prompt, items, bucket, columns=columns)
        except Exception as error:  # noqa: BLE001 - the images are paid for and published, whatever fails here
            logger.warning("There is no contact sheet of %r: %s. Its images are published.", prompt[:60], error)
        else:
            logger.info("Contact sheet: %s", sheets[prompt])
    return sheets


async def publish_contact_sheet(prompt: str, items: Sequence[ItemRecord], bucket: ImageBucket, columns: int) -> str:
    """Publish a prompt's contact sheet, show it in the run and return its address.

    The key is a digest of the sheet's requests, so a repeated sweep replaces only its own sheet.
    """
    sheet = ContactSheet(prompt, len(items), columns)
    for item in items:
        content = await bucket.read_image(item.images[0]) if item.images else None
        await anyio.to_thread.run_sync(sheet.add, Cell(_label(item), content))
    places = "\n".join(json.dumps(item.request.payload(), sort_keys=True) for item in items if item.request is not None)
    digest = hashlib.sha256(places.encode()).hexdigest()[:32]
    path = f"contact-sheets/{digest}.jpg"
    await bucket.put_file(
        path,
        io.BytesIO(await anyio.to_thread.run_sync(sheet.to_jpeg)),
        content_type="image/jpeg",
        cache_control="no-cache",  # a later sweep may fill in failed images
    )
    uri = f"{bucket.uri}/{path}"
    text = _MARKDOWN.sub(r"\\\1", " ".join(prompt.split()))
    preview = await anyio.to_thread.run_sync(sheet.to_data_uri)
    await acreate_markdown_artifact(
        f"{text}\n\n![contact sheet]({preview})\n\n`{uri}`\n",
        key=f"flux-contact-sheet-{digest[:12]}",
        description=f"{len(items)} variants: {uri}",
    )
    return uri


def _prompt_of(record: ItemRecord) -> str:
    return "" if record.request is None else record.request.prompt


def _label(item: ItemRecord) -> str:
    request = item.request
    if request is None:
        return item.status
    text = f"seed {request.seed} · {request.shape}"
    if request.guidance_scale is not None:
        text += f" · guidance {request.guidance_scale:g}"
    return text if item.images else f"{item.status}: {text}"
