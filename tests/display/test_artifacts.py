"""What a batch leaves in Prefect's UI."""

from __future__ import annotations

import asyncio
import logging
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.images import ODD, draw, fake_published_image, publish
from support.reports import make_report

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.artifacts import (
    live_progress,
    object_url,
    publish_artifacts,
    write_markdown_gallery,
    write_summary,
)
from flux_prefect.display.progress import Progress
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport

BUCKET = ImageBucket(bucket_name="images", prefix="shop", public_base_url="https://cdn.example")
LOGGER = logging.getLogger("test_artifacts")


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
        """Note the tag."""
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name == "href" and value]
        self._inside = self._inside or tag == "td"
        if tag == "td":
            self.cells.append("")
        elif tag in {"div", "small"}:
            self.cells[-1] += "\n"

    def handle_data(self, data: str) -> None:
        """Note the text."""
        if self._inside:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        """Leave the cell."""
        self._inside = self._inside and tag != "td"


def _published(row: int, prompt: str = "a fox", **fields: Any) -> ItemRecord:
    request = ImageRequest(prompt=prompt, seed=row)
    image = fake_published_image(BUCKET, request)
    return ItemRecord(
        **{"row": row, "id": f"sku-{row}", "status": "published", "request": request, "images": (image,), **fields}
    )


def _failed(row: int, message: str = "The service refused it.", **fields: Any) -> ItemRecord:
    return ItemRecord(
        **{
            "row": row,
            "id": f"sku-{row}",
            "status": "failed",
            "request": ImageRequest(prompt="a fox", seed=row),
            "error": "RequestRefused",
            "message": message,
            **fields,
        }
    )


def _gallery(records: list[ItemRecord], folder: Path, page: str | None = None) -> str:
    drawn = {image.uri: "data:image/jpeg;base64,QUJD" for record in records for image in record.images}
    return write_markdown_gallery(records, drawn, make_report(records, folder), BUCKET, page)


class TestGallery:
    """The markdown of the gallery."""

    def test_an_image_has_its_facts_and_a_link(self, tmp_path: Path) -> None:
        """Prompt, id, how it ended, seed and credits under it; a click leads to the object."""
        record = _published(7, credits_used=168_000)
        text = _gallery([record], tmp_path, page="shop/manifests/run-1/index.html")
        read = Cells(text)

        assert read.cells == ["\na fox\nsku-7 · published · seed 7 · 168,000 credits"]
        assert '<img src="data:image/jpeg;base64,QUJD"' in text
        assert read.links == [
            "https://cdn.example/shop/manifests/run-1/index.html",
            f"https://cdn.example/{record.images[0].key}",
        ]

    def test_what_is_missing_shows_its_reason_in_its_place(self, tmp_path: Path) -> None:
        """Between the images, in the order given."""
        invalid = _failed(3, "row 3: seed is 'x'", status="invalid", request=None)
        read = Cells(_gallery([_published(1), _failed(2), invalid], tmp_path))

        assert read.cells[1:] == [
            "failed\nThe service refused it.\na fox\nsku-2 · seed 2",
            "invalid\nrow 3: seed is 'x'\nsku-3",
        ]

    def test_odd_text_shows_as_text(self, tmp_path: Path) -> None:
        """As one block of HTML, which ends at a blank line alone, so that no markdown is read in it."""
        text = _gallery([_published(1, ODD, id=ODD[:60]), _failed(2, ODD)], tmp_path)
        read = Cells(text)

        assert read.tags == {"table", "tbody", "tr", "td", "a", "img", "div", "small", "strong", "span"}
        assert " ".join(ODD.split()) in read.cells[0].replace("\u200b", "")
        assert "\n\n" not in text.strip()

    def test_nothing_that_a_database_refuses_gets_in(self, tmp_path: Path) -> None:
        """Control characters and halves of characters; joined emoji and marks of direction stay."""
        text = _gallery([_failed(1, "a\x00b\x1b \ud83e 👨‍👩‍👧 \u200f")], tmp_path)

        text.encode()
        assert "a\ufffdb\ufffd ? 👨‍👩‍👧 \u200f" in text

    def test_48_of_the_worst_stay_under_one_mebibyte(self, tmp_path: Path) -> None:
        """The largest thumbnails, the longest keys and texts of nothing but quotes or emoji."""
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
        """Else it would take the width of the other images."""
        (cell,) = Cells(_gallery([_published(1, "x" * 100)], tmp_path)).cells
        assert max(len(part) for part in cell.split("\n")[1].split("\u200b")) <= 24

    def test_a_batch_with_nothing_to_show_has_no_table(self, tmp_path: Path) -> None:
        """An empty one would show as a line."""
        assert _gallery([], tmp_path) == ""


class TestSummary:
    """The markdown of the summary."""

    def test_it_tells_the_sums_and_where_everything_is(self, tmp_path: Path) -> None:
        """Only of what there is something to tell."""
        records = [_published(row, calls=1, billed_calls=1, credits_used=168_000) for row in (1, 2, 3)]
        report = make_report(records, tmp_path, seconds=90).model_copy(update={"manifest": "s3://images/shop/m.jsonl"})
        text = write_summary(report, BUCKET, "shop/manifests/run-1/index.html")
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

    def test_failures_are_told_by_kind_with_an_example(self, tmp_path: Path) -> None:
        """The commonest first, with what to do."""
        odd = _failed(9, ODD, id="<b>", status="flagged", error="ContentFlagged")
        text = write_summary(make_report([odd, _failed(1), _failed(2)], tmp_path), BUCKET, None)

        assert text.index("2 failed: RequestRefused") < text.index("1 flagged: ContentFlagged")
        assert "sku-1</span>: The service refused it." in text
        assert "&lt;b&gt;</span>: &lt;script&gt;" in text
        assert "`only` set to `failed`" in text

    def test_money_that_may_be_lost_is_told_with_its_ids(self, tmp_path: Path) -> None:
        """At most fifty of each kind, then where the others are."""
        lost = tuple(f"fp-{number}" for number in range(70))
        records = [_failed(1, possibly_billed=("fp-a",), billed_and_lost=lost)]
        text = write_summary(make_report(records, tmp_path), BUCKET, None)

        assert "### Possibly billed" in text
        assert "<code>fp-a</code>" in text
        assert "<code>fp-49</code>" in text
        assert "<code>fp-50</code>" not in text
        assert "and 20 more in the manifest" in text


class TestAddresses:
    """Where a browser finds an object."""

    def test_the_public_address_where_there_is_one(self) -> None:
        """Quoted as a URL needs it."""
        assert object_url(BUCKET, "a b/ü.jpg") == "https://cdn.example/a%20b/%C3%BC.jpg"

    def test_the_console_for_a_private_bucket_of_aws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever may see the object signs in there."""
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        private = ImageBucket(bucket_name="images", region_name="eu-west-1")
        assert object_url(private, "a b/1.jpg") == (
            "https://console.aws.amazon.com/s3/object/images?prefix=a%20b%2F1.jpg"
        )

    def test_the_server_itself_for_any_other(self) -> None:
        """Bucket and key in the path."""
        own = ImageBucket(bucket_name="images", endpoint_url="http://127.0.0.1:9/", region_name="eu-west-1")
        assert object_url(own, "a/1.jpg") == "http://127.0.0.1:9/images/a/1.jpg"


async def _artifacts(run: str) -> dict[str | None, Any]:
    async with get_client() as client:
        only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(run)]))
        return {artifact.key: artifact for artifact in await client.read_artifacts(artifact_filter=only)}


@pytest.mark.usefixtures("prefect_server")
class TestInARun:
    """With a real Prefect server."""

    async def test_progress_is_live_and_whole_at_the_end(self) -> None:
        """One artifact, brought up to date while the block runs."""
        progress = Progress(4)
        seen = []

        @flow
        async def batch() -> str:
            run = str(flow_run.id)
            async with live_progress(progress, LOGGER, every=0.05):
                progress.add(_published(1))
                for _ in range(200):
                    await asyncio.sleep(0.05)
                    found = (await _artifacts(run)).get("flux-progress")
                    if found is not None and found.data == 25:
                        seen.append(found.description)
                        break
                for row in (2, 3, 4):
                    progress.add(_published(row))
            return run

        (found,) = (await _artifacts(await batch())).values()
        assert [text.startswith("1 of 4 done, 0 credits ($0.00) so far, ") for text in seen] == [True]
        assert (found.key, found.type, found.data) == ("flux-progress", "progress", 100)
        assert found.description == "4 of 4 done, 0 credits ($0.00) so far"

    async def test_a_batch_that_ends_leaves_all_three(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """Summary and gallery at the run, the page in the bucket."""
        request = ImageRequest(prompt=ODD, seed=1)
        image = await publish(bucket, tmp_path, request, draw(90))
        records = [ItemRecord(row=1, id="fox", status="published", request=request, images=(image,)), _failed(2)]
        report = _finish(records, bucket, tmp_path)
        found = await _artifacts(await _leave(report, records, bucket, tmp_path))

        assert set(found) == {"flux-summary", "flux-gallery"}
        assert {artifact.description for artifact in found.values()} == {report.summary()}
        assert str(found["flux-gallery"].data).count("data:image/jpeg;base64,") == 1
        page = bucket.get_client().get_object(
            Bucket=bucket.bucket_name, Key=f"{bucket.prefix}/manifests/run-1/index.html"
        )
        assert b"<article" in page["Body"].read()

    async def test_what_can_not_be_done_is_told_and_fails_nothing(
        self, bucket: ImageBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Without a bucket there is no page; without images the gallery says so."""
        gone = ImageBucket(**{**bucket.model_dump(), "bucket_name": "no-such-bucket"})
        records = [_published(1)]
        found = await _artifacts(await _leave(_finish(records, gone, tmp_path), records, gone, tmp_path))

        assert "The page of all images is missing from this run's artifacts: " in caplog.text
        assert "index.html" not in str(found["flux-summary"].data)
        assert "no thumbnail" in str(found["flux-gallery"].data)


@pytest.mark.usefixtures("prefect_server")
async def test_a_run_of_the_batch_flow_leaves_them_all(bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """Under keys that never change, at a run whose name says what ran."""
    table = [{"id": name, "prompt": f"{name} {uuid4().hex}"} for name in ("fox", "owl")]
    report = await publish_batch(table, bucket, credentials)

    run = report.items[0].run
    assert run is not None
    found = await _artifacts(run)
    assert set(found) == {"flux-plan", "flux-progress", "flux-summary", "flux-gallery"}
    assert found["flux-progress"].data == 100
    assert str(found["flux-gallery"].data).count("data:image/jpeg;base64,") == 2
    async with get_client() as client:
        assert (await client.read_flow_run(UUID(run))).name == "2 requests · 2 images"


async def test_a_server_that_can_not_be_reached_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The block runs to its end; a line of the log tells that the artifact is not to be trusted."""
    progress = Progress(1)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        async with live_progress(progress, LOGGER, every=0.01):
            progress.add(_published(1))
    assert "The progress artifact is out of date" in caplog.text


async def test_a_block_that_fails_is_not_held_up() -> None:
    """Its own error comes out at once."""
    with pytest.raises(RuntimeError, match="own"):
        async with live_progress(Progress(1), LOGGER):
            raise RuntimeError("its own")


def _finish(records: list[ItemRecord], bucket: ImageBucket, folder: Path) -> BatchReport:
    manifest = f"{bucket.uri}/manifests/run-1/manifest.jsonl"
    return make_report(records, folder).model_copy(update={"manifest": manifest})


async def _leave(report: BatchReport, records: list[ItemRecord], bucket: ImageBucket, folder: Path) -> str:
    @flow
    async def batch() -> str:
        await publish_artifacts(report, records, bucket, Spool(folder / "spool"), LOGGER)
        return str(flow_run.id)

    return await batch()
