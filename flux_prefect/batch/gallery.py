"""A page of a batch's pictures that opens from disk."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import anyio
import anyio.to_thread
import jinja2

from flux_prefect.batch.report import BatchReport, ItemRecord
from flux_prefect.bucket import ImageBucket, PublishedImage

_DOWNLOADS_AT_ONCE = 8


@dataclass(frozen=True)
class _Picture:
    image: PublishedImage
    file: str


@dataclass(frozen=True)
class _Item:
    record: ItemRecord
    pictures: list[_Picture]


async def write_gallery(report: BatchReport, bucket: ImageBucket, folder: Path, *, title: str) -> Path:
    """Write `folder/index.html` with the pictures as they stand in the bucket; returns its path.

    The pictures are read from S3 into `folder/pictures`, so the page needs neither network nor public bucket. Items
    without pictures show their reason. Everything that came from a table is escaped.

    Raises:
        BucketError: a picture can't be read.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    limit = anyio.CapacityLimiter(_DOWNLOADS_AT_ONCE)

    async def fetch(image: PublishedImage, path: Path) -> None:
        async with limit:
            content = await bucket.read_image(image)
        await anyio.to_thread.run_sync(path.write_bytes, content)

    items = []
    async with anyio.create_task_group() as downloads:
        for record in report.read():
            shown = [_Picture(image, _file_name(image)) for image in record.images]
            items.append(_Item(record, shown))
            for picture in shown:
                downloads.start_soon(fetch, picture.image, folder / picture.file)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        resources.files(__package__).joinpath("gallery.html.j2").read_text(encoding="utf-8")
    )
    page = folder / "index.html"
    page.write_text(template.render(title=title, summary=report.summary(), items=items), encoding="utf-8")
    return page


def _file_name(image: PublishedImage) -> str:
    # Not the key's last part: a template may end in one that many keys share.
    return f"pictures/{image.fingerprint}-{image.index}{Path(image.key).suffix}"
