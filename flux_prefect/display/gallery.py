"""The HTML page of a batch's images, in the bucket beside its manifest or in a folder.

The page is one file and loads only the images beside it, so that it works from the bucket, through a CDN and from disk.
Without JavaScript it is a plain list; with JavaScript, the list can be filtered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import BinaryIO, get_args
from urllib.parse import quote

import anyio.to_thread
import jinja2

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.concurrency import for_each
from flux_prefect.manifest.records import ItemRecord, ItemStatus
from flux_prefect.manifest.report import BatchReport

__all__ = ["publish_page", "write_gallery", "write_page"]

_DOWNLOADS_AT_ONCE = 8


@dataclass(frozen=True)
class _Image:
    image: PublishedImage
    address: str


@dataclass(frozen=True)
class _Item:
    record: ItemRecord
    images: list[_Image]

    @property
    def details(self) -> str:
        record = self.record.model_dump(mode="json", exclude_defaults=True, exclude={"request", "images", "run"})
        request = {} if self.record.request is None else {"request": self.record.request.payload()}
        objects = {"objects": [image.uri for image in self.record.images]} if self.record.images else {}
        return json.dumps({**record, **request, **objects}, indent=1, ensure_ascii=False)


def write_page(report: BatchReport, file: BinaryIO, *, title: str, address_of: Callable[[PublishedImage], str]) -> None:
    """Write the page of a batch: every row in the table's order, with its images or its error.

    Text from the table and the service is always shown as text. Takes about a kilobyte and a fifth of a millisecond a
    row, with one row at a time in memory; call it in a thread.

    Args:
        report: the batch's report, on the host of its run.
        file: the file to write, in UTF-8.
        title: the heading.
        address_of: returns an image's URL relative to the page.

    Raises:
        TableError: the records are missing.
    """
    style, script = _asset("gallery.css"), _asset("gallery.js")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_asset("gallery.html.j2"))
    items = (_Item(record, [_Image(image, address_of(image)) for image in record.images]) for record in report.read())
    parts = page.generate(
        title=title,
        report=report,
        statuses=[status for status in get_args(ItemStatus) if report.count(status)],
        items=items,
        style=style,
        script=script,
        policy=_policy(style, script),
    )
    file.writelines(part.encode(errors="replace") for part in parts)


async def publish_page(report: BatchReport, bucket: ImageBucket) -> str:
    """Upload the page as `index.html` beside the run's manifest; returns its key.

    Its links to the images are relative, so that it also works in a copy of the prefix.

    Raises:
        ValueError: the report's manifest is not in this bucket.
        TableError: the records are missing.
        OSError: there is no space for a temporary copy of the page.
        BucketError: the upload failed.
    """
    folder = (report.manifest or "").removeprefix(f"{bucket.uri}/").rpartition("/")[0]
    if not folder.startswith("manifests/"):
        raise ValueError(f"the manifest {report.manifest!r} is not below {bucket.uri}")
    path = f"{folder}/index.html"
    with tempfile.TemporaryFile() as file:
        await anyio.to_thread.run_sync(_write_beside_manifest, report, file, bucket)
        await bucket.put_file(path, file, content_type="text/html; charset=utf-8", cache_control="no-cache")
    return f"{bucket.prefix}/{path}" if bucket.prefix else path


async def write_gallery(report: BatchReport, bucket: ImageBucket, folder: Path, *, title: str) -> Path:
    """Write `folder/index.html` with the published images; returns its path.

    The images are downloaded from S3 to `folder/images`, so that the page needs neither a network nor a public bucket.

    Raises:
        TableError: the records are missing.
        BucketError: an image can't be read.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)

    async def fetch(image: PublishedImage) -> None:
        content = await bucket.read_image(image)
        await anyio.to_thread.run_sync((folder / _file_name(image)).write_bytes, content)

    def images() -> Iterator[PublishedImage]:
        for record in report.read():
            yield from record.images

    await for_each(images(), fetch, at_once=_DOWNLOADS_AT_ONCE)
    page = folder / "index.html"
    with page.open("wb") as file:
        await anyio.to_thread.run_sync(lambda: write_page(report, file, title=title, address_of=_file_address))
    return page


def _write_beside_manifest(report: BatchReport, file: BinaryIO, bucket: ImageBucket) -> None:
    above = f"{bucket.prefix}/" if bucket.prefix else ""

    def address_of(image: PublishedImage) -> str:
        return f"../../{quote(image.key.removeprefix(above))}"

    write_page(report, file, title=f"Published to {bucket.uri}", address_of=address_of)
    file.seek(0)


def _file_name(image: PublishedImage) -> str:
    # The key's last part would not do: a key template can end in a part that many keys share.
    return f"images/{image.fingerprint}-{image.index}{Path(image.key).suffix}"


def _file_address(image: PublishedImage) -> str:
    return quote(_file_name(image))


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: only the page's own style and script, and images from its own origin."""
    styles, scripts = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script))
    return (
        f"default-src 'none'; img-src 'self' file:; style-src 'sha256-{styles}'; script-src 'sha256-{scripts}'; "
        "base-uri 'none'; form-action 'none'"
    )
