"""The HTML page of a batch's images, in the bucket and in a folder."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from support.images import ODD, draw, fake_published_image, publish
from support.reports import make_report

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.gallery import publish_page, write_gallery, write_page
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport

BUCKET = ImageBucket(bucket_name="images")


@dataclass
class Element:
    """A tag, and the text from it to the next tag."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""


class Page(HTMLParser):
    """The elements of a page, as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements = [Element("", {})]
        self._open = True
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start an element."""
        self.elements.append(Element(tag, dict(attrs)))
        self._open = True

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 - as `HTMLParser` has it
        """Ignore the text after it."""
        self._open = False

    def handle_data(self, data: str) -> None:
        """Add text to the open element."""
        if self._open:
            self.elements[-1].text += data

    def texts(self, *tags: str) -> list[str]:
        """The texts of these elements."""
        return [element.text for element in self.elements if element.tag in tags]

    def values(self, tag: str, attribute: str) -> list[str]:
        """An attribute of every such element."""
        found = (element.attributes.get(attribute) for element in self.elements if element.tag == tag)
        return [value for value in found if value]


def render(report: BatchReport, title: str = "Published") -> str:
    """The page as text."""
    file = io.BytesIO()
    write_page(report, file, title=title, address_of=lambda image: image.key)
    return file.getvalue().decode()


@pytest.fixture
def odd(tmp_path: Path) -> BatchReport:
    """A batch whose texts all contain markup: one row published, one failed, one invalid."""
    request = ImageRequest(prompt=ODD, seed=7)
    return make_report(
        [
            ItemRecord(
                row=1, id=ODD, status="published", request=request, images=(fake_published_image(BUCKET, request),)
            ),
            ItemRecord(
                row=2,
                id="x",
                status="failed",
                request=ImageRequest(prompt="a fox", seed=1),
                error="RequestRefused",
                message=ODD,
            ),
            ItemRecord(
                row=3, id="y", status="invalid", request=None, error="InvalidRow", message=ODD, carried={"shelf": ODD}
            ),
        ],
        tmp_path,
    )


def test_markup_in_text_is_shown_as_text(odd: BatchReport) -> None:
    """A prompt, id, message, column or title never becomes a tag, and is shown in full."""
    page = Page(render(odd, title=ODD))

    assert {element.tag for element in page.elements} <= {
        *("", "html", "head", "meta", "title", "style", "body", "header", "h1", "form", "button", "b", "input"),
        *("output", "main", "article", "a", "img", "div", "p", "bdi", "details", "summary", "pre", "script"),
    }
    assert len(page.texts("script")) == 1
    assert page.texts("title", "h1") == [ODD, ODD]
    assert page.texts("p") == [
        "1 published, 1 failed, 1 invalid; 0 calls billed, 0 credits ($0.00)",
        *(ODD, ""),
        *(f"failed: {ODD}", "a fox", ""),
        *(f"invalid: {ODD}", ""),
    ]
    assert page.texts("bdi") == [ODD, "x", "y"]


def test_the_details_have_the_whole_request(odd: BatchReport) -> None:
    """With all defaults, the row's other columns, its images and its error."""
    page = Page(render(odd))
    details = page.texts("pre")

    assert len(details) == 3
    assert '"safety_tolerance": "2"' in details[0]
    assert '"objects": [\n  "s3://images/' in details[0]
    assert '"error": "RequestRefused"' in details[1]
    assert '"shelf"' in details[2]


def test_only_images_are_loaded_and_only_its_own_script_runs(odd: BatchReport) -> None:
    """The page's Content-Security-Policy has the digests of its style and its script, and no other source."""
    page = Page(render(odd))
    policy = page.values("meta", "content")[0]
    (style,), (script,) = page.texts("style"), page.texts("script")

    assert policy.startswith("default-src 'none'; img-src 'self' file:; ")
    for kind, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert page.values("link", "href") == []
    assert page.values("script", "src") == []
    assert not re.search(r"url\(|@import", style)


def test_it_can_be_filtered_by_status(odd: BatchReport) -> None:
    """There is a button for each status. Without JavaScript the form is hidden and the list is shown."""
    page = Page(render(odd))

    assert page.values("button", "value") == ["published", "failed", "invalid"]
    assert page.values("article", "data-status") == ["published", "failed", "invalid"]
    assert [element.tag for element in page.elements if "hidden" in element.attributes] == ["form"]


def test_records_are_read_as_they_are_written() -> None:
    """One at a time, so that a long batch takes no more memory than a short one."""
    request = ImageRequest(prompt="a fox", seed=1)
    read: list[int] = []

    class Lazy(BatchReport):
        """A report that counts how many records were read."""

        def read(self, *_: object) -> Iterator[ItemRecord]:
            """Yield far more rows than one write takes."""
            for row in range(1, 501):
                read.append(row)
                yield ItemRecord(row=row, id=str(row), status="skipped_budget", request=request)

    class Started(Exception):
        """The first row was written."""

    class File(io.BytesIO):
        """A file that stops the writing at the first row."""

        def writelines(self, lines: Iterable[Any]) -> None:
            """Raise once a line has a row."""
            if any(b"<article" in line for line in lines):
                raise Started

    with pytest.raises(Started):
        write_page(Lazy(counts={"skipped_budget": 500}), File(), title="x", address_of=lambda image: image.key)
    assert len(read) < 5


@pytest.mark.parametrize("prefix", ["", "shop/a b#c"])
async def test_the_page_in_the_bucket_has_relative_links_to_its_images(
    bucket: ImageBucket, tmp_path: Path, prefix: str
) -> None:
    """It is beside the manifest, with a content type that browsers show, and is revalidated by caches."""
    home = bucket.model_copy(update={"prefix": f"{bucket.prefix}/{prefix}" if prefix else bucket.prefix})
    home = home.model_copy(update={"key_template": "by seed/{seed}/{fingerprint}-{index}.{extension}"})
    request = ImageRequest(prompt="a fox", seed=7)
    image = await publish(home, tmp_path, request, draw(90))
    report = make_report([ItemRecord(row=1, id="fox", status="published", request=request, images=(image,))], tmp_path)
    key = await publish_page(report.model_copy(update={"manifest": f"{home.uri}/manifests/run-1/m.jsonl"}), home)

    assert key == f"{home.prefix}/manifests/run-1/index.html"
    stored = home.get_client().get_object(Bucket=home.bucket_name, Key=key)
    assert (stored["ContentType"], stored["CacheControl"]) == ("text/html; charset=utf-8", "no-cache")
    page = Page(stored["Body"].read().decode())
    (address,) = page.values("img", "src")
    assert page.values("a", "href") == [address]
    assert address.startswith("../../by%20seed/7/")
    assert unquote(address).replace("../..", home.prefix, 1) == image.key


async def test_a_page_without_a_manifest_beside_it_is_refused(tmp_path: Path) -> None:
    """Its links would not lead to the images."""
    report = make_report([], tmp_path).model_copy(update={"manifest": "s3://other/manifests/run-1/manifest.jsonl"})
    with pytest.raises(ValueError, match="not below s3://images"):
        await publish_page(report, BUCKET)


async def test_in_a_folder_the_images_are_beside_the_page(bucket: ImageBucket, tmp_path: Path) -> None:
    """Byte for byte, with any key template."""
    nested = bucket.model_copy(update={"key_template": "{fingerprint}/{index}.{extension}"})
    requests = [ImageRequest(prompt=ODD, seed=seed) for seed in (1, 2)]
    images = [await publish(nested, tmp_path, request, draw(40 * (request.seed or 0))) for request in requests]
    items = [
        ItemRecord(row=number, id=str(number), status="published", request=request, images=(image,))
        for number, (request, image) in enumerate(zip(requests, images, strict=True), start=1)
    ]
    path = await write_gallery(make_report(items, tmp_path), nested, tmp_path / "gallery", title="Published")

    addresses = Page(path.read_text(encoding="utf-8")).values("img", "src")
    shown = [hashlib.sha256((path.parent / address).read_bytes()).hexdigest() for address in addresses]
    assert shown == [image.sha256 for image in images]


def test_a_call_that_two_rows_share_is_counted_once(tmp_path: Path) -> None:
    """Both rows record it; the report lists it once."""
    request = ImageRequest(prompt="a fox", seed=1)
    items = [
        ItemRecord(row=row, id=str(row), status="published", request=request, possibly_billed=("fp-1",))
        for row in (1, 2)
    ]
    report = make_report(items, tmp_path)

    assert report.possibly_billed == ("fp-1",)
    assert report.summary().endswith("; 1 possibly billed")
