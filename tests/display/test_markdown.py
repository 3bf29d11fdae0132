"""The markdown of a batch's summary and gallery."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.images import ODD, fake_published_image
from support.reports import SHOP, failed_record, make_report, published_record

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.markdown import object_url, write_markdown_gallery, write_summary
from flux_prefect.manifest.records import ItemRecord


class Cells(HTMLParser):
    """The cells of a page's tables: their tags and their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the tag."""
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name == "href" and value]
        self._inside = self._inside or tag == "td"
        if tag == "td":
            self.cells.append("")
        elif tag in {"div", "small"}:
            self.cells[-1] += "\n"

    def handle_data(self, data: str) -> None:
        """Record the text."""
        if self._inside:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        """Leave the cell."""
        self._inside = self._inside and tag != "td"


def _gallery(records: list[ItemRecord], folder: Path, page: str | None = None) -> str:
    drawn = {image.uri: "data:image/jpeg;base64,QUJD" for record in records for image in record.images}
    return write_markdown_gallery(records, drawn, make_report(records, folder), SHOP, page)


class TestGallery:
    """The markdown of the gallery."""

    def test_an_image_has_its_facts_and_a_link(self, tmp_path: Path) -> None:
        """Prompt, id, status, seed and credits are below it; it links to the object."""
        record = published_record(7, credits_used=168_000)
        text = _gallery([record], tmp_path, page="shop/manifests/run-1/index.html")
        read = Cells(text)

        assert read.cells == ["\na fox\nsku-7 · published · seed 7 · 168,000 credits"]
        assert '<img src="data:image/jpeg;base64,QUJD"' in text
        assert read.links == [
            "https://cdn.example/shop/manifests/run-1/index.html",
            f"https://cdn.example/{record.images[0].key}",
        ]

    def test_a_row_without_an_image_shows_its_error(self, tmp_path: Path) -> None:
        """Among the images, in the order of the records."""
        invalid = failed_record(3, "row 3: seed is 'x'", status="invalid", request=None)
        read = Cells(_gallery([published_record(1), failed_record(2), invalid], tmp_path))

        assert read.cells[1:] == [
            "failed\nThe service refused it.\na fox\nsku-2 · seed 2",
            "invalid\nrow 3: seed is 'x'\nsku-3",
        ]

    def test_markup_in_text_is_shown_as_text(self, tmp_path: Path) -> None:
        """The gallery is one block of HTML, which only a blank line would end, so that no markdown is read in it."""
        text = _gallery([published_record(1, ODD, id=ODD[:60]), failed_record(2, ODD)], tmp_path)
        read = Cells(text)

        assert read.tags == {"table", "tbody", "tr", "td", "a", "img", "div", "small", "strong", "span"}
        assert " ".join(ODD.split()) in read.cells[0].replace("\u200b", "")
        assert "\n\n" not in text.strip()

    def test_characters_that_a_database_rejects_are_replaced(self, tmp_path: Path) -> None:
        """Control characters and lone surrogates; joined emoji and direction marks stay."""
        text = _gallery([failed_record(1, "a\x00b\x1b \ud83e 👨‍👩‍👧 \u200f")], tmp_path)

        text.encode()
        assert "a\ufffdb\ufffd ? 👨‍👩‍👧 \u200f" in text

    def test_48_images_stay_under_one_mebibyte(self, tmp_path: Path) -> None:
        """With the largest thumbnails, the longest keys, and texts of only quotes or emoji."""
        long = ImageBucket(
            bucket_name="images", prefix="/".join(["ü" * 100] * 4), public_base_url="https://cdn.example"
        )
        records = []
        for row in range(1, 61):
            request = ImageRequest(prompt=('"' if row % 2 else "🦊") * 4000, seed=row)
            image = fake_published_image(long, request)
            records.append(
                ItemRecord(row=row, id='"' * 500, status="published", request=request, images=(image,), credits_used=1)
            )
        worst = "data:image/jpeg;base64," + "A" * 12_000
        drawn = {record.images[0].uri: worst for record in records}
        text = write_markdown_gallery(records, drawn, make_report(records, tmp_path), long, "page")

        assert text.count(worst) == 48
        assert 48 * len(worst) < len(text.encode()) < 1024 * 1024

    def test_a_long_word_can_break(self, tmp_path: Path) -> None:
        """Otherwise it would widen its column at the expense of the others."""
        (cell,) = Cells(_gallery([published_record(1, "x" * 100)], tmp_path)).cells
        assert max(len(part) for part in cell.split("\n")[1].split("\u200b")) <= 24

    def test_an_empty_batch_has_no_table(self, tmp_path: Path) -> None:
        """An empty table would be shown as a line."""
        assert _gallery([], tmp_path) == ""


class TestSummary:
    """The markdown of the summary."""

    def test_it_has_the_sums_and_the_addresses(self, tmp_path: Path) -> None:
        """Without lines for zeros."""
        records = [published_record(row, calls=1, billed_calls=1, credits_used=168_000) for row in (1, 2, 3)]
        report = make_report(records, tmp_path, seconds=90).model_copy(update={"manifest": "s3://images/shop/m.jsonl"})
        text = write_summary(report, SHOP, "shop/manifests/run-1/index.html")
        cells = [cell.rstrip("\u2002") for cell in Cells(text).cells]

        assert dict(zip(cells[::2], cells[1::2], strict=True)) == {
            "rows": "3",
            "published": "3",
            "calls billed": "3",
            "cost": "504,000 credits ($0.25)",
            "time": "2 min",
            "pace": "2 images a minute",
            "page": "s3://images/shop/manifests/run-1/index.html",
            "manifest": "s3://images/shop/m.jsonl",
        }
        assert "###" not in text

    def test_failures_are_listed_by_kind_with_an_example(self, tmp_path: Path) -> None:
        """The most frequent first, with the remedy."""
        odd = failed_record(9, ODD, id="<b>", status="flagged", error="ContentFlagged")
        text = write_summary(make_report([odd, failed_record(1), failed_record(2)], tmp_path), SHOP, None)

        assert text.index("2 failed: RequestRefused") < text.index("1 flagged: ContentFlagged")
        assert "sku-1</span>: The service refused it." in text
        assert "&lt;b&gt;</span>: &lt;script&gt;" in text
        assert "`only` set to `failed`" in text

    def test_calls_that_cost_without_an_image_are_listed_by_id(self, tmp_path: Path) -> None:
        """At most fifty of each kind, then a reference to the manifest."""
        lost = tuple(f"fp-{number}" for number in range(70))
        records = [failed_record(1, possibly_billed=("fp-a",), billed_and_lost=lost)]
        text = write_summary(make_report(records, tmp_path), SHOP, None)

        assert "### Possibly billed" in text
        assert "<code>fp-a</code>" in text
        assert "<code>fp-49</code>" in text
        assert "<code>fp-50</code>" not in text
        assert "and 20 more in the manifest" in text


class TestAddresses:
    """The URL of an object for a browser."""

    def test_an_object_has_the_public_address_of_its_bucket(self) -> None:
        """Percent-encoded."""
        assert object_url(SHOP, "a b/ü.jpg") == "https://cdn.example/a%20b/%C3%BC.jpg"

    def test_in_a_private_bucket_of_aws_it_has_its_page_in_the_console(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Users with access sign in there."""
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        private = ImageBucket(bucket_name="images", region_name="eu-west-1")
        assert object_url(private, "a b/1.jpg") == (
            "https://console.aws.amazon.com/s3/object/images?prefix=a%20b%2F1.jpg"
        )

    def test_on_other_servers_it_has_the_servers_url(self) -> None:
        """With bucket and key in the path."""
        own = ImageBucket(bucket_name="images", endpoint_url="http://127.0.0.1:9/", region_name="eu-west-1")
        assert object_url(own, "a/1.jpg") == "http://127.0.0.1:9/images/a/1.jpg"
