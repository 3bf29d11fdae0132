from __future__ import annotations

import io
import pickle
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.reports import make_report

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.custody import CallOutcome
from flux_prefect.errors import AnswerLost, BatchFailed, Billed, ContentFlagged, ImageGone, OutOfCredits
from flux_prefect.host.spool import PaidCall
from flux_prefect.manifest.records import ItemRecord, record_failed, record_invalid, record_production
from flux_prefect.manifest.report import BatchReport, tabulate
from flux_prefect.money.budget import describe_credits
from flux_prefect.pipeline import ImageOutcome, Production
from flux_prefect.tables.table import Row

NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
REQUEST = ImageRequest(prompt="a lighthouse", seed=7)
ROW = Row(3, "dusk", REQUEST, {"sku": "007"})


def _image(index: int = 0, *, created: bool = True) -> PublishedImage:
    return PublishedImage(
        bucket="images",
        key=f"team/{index}.jpg",
        uri=f"s3://images/team/{index}.jpg",
        url=None,
        etag="e",
        sha256="a" * 64,
        size=1000,
        content_type="image/jpeg",
        width=96,
        height=64,
        fingerprint="f" * 32,
        index=index,
        seed=7,
        sidecar_key=f"team/{index}.jpg.aaaaaaaaaaaaaaaa.json",
        published_at=NOON,
        created=created,
    )


def _open_call(number: int, billed: Billed) -> PaidCall:
    return PaidCall(
        client_request_id=f"fp-{number}",
        fingerprint="f" * 32,
        endpoint="https://api.aimlapi.com",
        sent_at=NOON,
        task_run_id=None,
        billed=billed,
    )


def _production(*outcomes: ImageOutcome, **more: Any) -> Production:
    return Production(REQUEST, "f" * 32, outcomes={outcome.index: outcome for outcome in outcomes}, **more)


def _record(status: Any, row: int = 1, **more: Any) -> ItemRecord:
    return ItemRecord(row=row, id=str(row), status=status, request=None if status == "invalid" else REQUEST, **more)


NEW, OLD = ImageOutcome(0, image=_image()), ImageOutcome(0, image=_image(created=False))
FLAGGED = ImageOutcome(0, error=ContentFlagged("flagged"))
LOST = ImageOutcome(0, error=AnswerLost("the answer was lost"))


class TestRecords:
    """The record of one row."""

    def test_an_invalid_row_has_its_reason(self) -> None:
        """It has no request and no calls, and keeps the row's other columns."""
        record = record_invalid(Row(3, "dusk", None, {"sku": "007"}, "row 3: seed is '0'"))
        assert record == ItemRecord(
            row=3,
            id="dusk",
            status="invalid",
            request=None,
            error="InvalidRow",
            message="row 3: seed is '0'",
            carried={"sku": "007"},
        )

    def test_a_row_whose_work_raised_has_the_error(self) -> None:
        """Its class and message; for an error without a message, its representation."""
        record = record_failed(ROW, REQUEST, OSError("no space"))
        assert (record.status, record.error, record.message) == ("failed", "OSError", "no space")
        assert (record.row, record.id, record.request, record.carried) == (3, "dusk", REQUEST, {"sku": "007"})
        assert record_failed(ROW, REQUEST, TimeoutError()).message == "TimeoutError()"

    def test_a_published_row_has_its_images_and_its_cost(self) -> None:
        """All calls are counted, the billed ones also by themselves, with their credits."""
        calls = [CallOutcome("fp-1", Billed.NO, None), CallOutcome("fp-2", Billed.YES, 168_000.0)]
        record = record_production(ROW, _production(NEW, calls=calls, regenerated=True, refetched=1))
        assert (record.row, record.id, record.status, record.carried) == (3, "dusk", "published", {"sku": "007"})
        assert record.images == (_image(),)
        assert (record.error, record.message) == (None, None)
        assert (record.calls, record.billed_calls, record.credits_used) == (2, 1, 168_000)
        assert (record.regenerated, record.refetched) == (True, 1)

    def test_lost_money_is_listed_by_call(self) -> None:
        """Calls billed without an image and possibly billed calls are separate lists, by their ids in the log."""
        lost = [_open_call(1, Billed.YES), _open_call(2, Billed.UNKNOWN), _open_call(3, Billed.UNKNOWN)]
        record = record_production(ROW, _production(LOST, open_calls=lost))
        assert record.billed_and_lost == ("fp-1",)
        assert record.possibly_billed == ("fp-2", "fp-3")
        assert (record.status, record.error, record.message) == ("failed", "AnswerLost", "the answer was lost")

    @pytest.mark.parametrize(
        ("outcomes", "status"),
        [
            ([OLD, NEW], "published"),
            ([OLD, OLD], "unchanged"),
            ([NEW, FLAGGED], "flagged"),
            ([FLAGGED, LOST, NEW], "failed"),
            ([OLD, LOST], "failed"),
        ],
    )
    def test_a_row_has_the_status_of_its_worst_image(self, outcomes: list[ImageOutcome], status: str) -> None:
        """Images that are in the bucket are listed in any case."""
        numbered = [
            ImageOutcome(
                index, None if outcome.image is None else _image(index, created=outcome.image.created), outcome.error
            )
            for index, outcome in enumerate(outcomes)
        ]
        record = record_production(ROW, _production(*numbered))
        assert record.status == status
        assert [image.index for image in record.images] == [one.index for one in numbered if one.image is not None]

    def test_the_first_error_is_recorded(self) -> None:
        """In the order of the images."""
        gone, lost = ImageOutcome(1, error=ImageGone("gone")), ImageOutcome(2, error=AnswerLost("lost"))
        assert record_production(ROW, _production(lost, NEW, gone)).message == "gone"


class TestReport:
    """The report's sums and texts."""

    @pytest.fixture
    def report(self, tmp_path: Path) -> BatchReport:
        """Rows of every status."""
        return make_report(
            [
                _record(
                    "published", 1, calls=2, billed_calls=1, unbilled_calls=1, credits_used=168_000, images=(_image(),)
                ),
                _record("published", 2, calls=1, billed_calls=1, credits_used=168_000, images=(_image(),)),
                _record("unchanged", 3, images=(_image(created=False),)),
                _record(
                    "flagged",
                    4,
                    calls=1,
                    billed_calls=1,
                    credits_used=168_000,
                    error="ContentFlagged",
                    message="unsafe",
                ),
                _record("failed", 5, calls=2, error="AnswerLost", message="lost", possibly_billed=("fp-1", "fp-2")),
                _record(
                    "failed",
                    6,
                    calls=1,
                    billed_calls=1,
                    error="EmptyGeneration",
                    message="empty",
                    billed_and_lost=("fp-3",),
                ),
                _record("invalid", 7, error="InvalidRow", message="row 7: [red]seed[/red] is '0'"),
            ],
            tmp_path,
            seconds=12.34,
        )

    def test_every_row_is_counted_once(self, report: BatchReport) -> None:
        """The counts add up to the number of rows."""
        counts = {status: report.count(status) for status in ("published", "unchanged", "flagged", "failed", "invalid")}
        assert counts == {"published": 2, "unchanged": 1, "flagged": 1, "failed": 2, "invalid": 1}
        assert report.rows == 7
        assert report.unsuccessful == 4
        assert [item.row for item in report.read("failed", "flagged", "invalid")] == [4, 5, 6, 7]
        assert (report.billed_calls, report.credits_used) == (4, 504_000)
        assert report.possibly_billed == ("fp-1", "fp-2")

    def test_every_call_is_billed_or_unbilled_or_unknown(self, report: BatchReport) -> None:
        """The three sums add up to the number of calls."""
        assert (report.calls, report.billed_calls, report.unbilled_calls, report.unknown_calls) == (7, 4, 1, 2)
        assert report.billed_and_lost == ("fp-3",)

    def test_the_summary_is_one_line(self, report: BatchReport) -> None:
        """With images, costs, and costs that are uncertain."""
        assert report.summary() == (
            "2 published, 1 already there, 1 flagged, 2 failed, 1 invalid; "
            "4 calls billed, 504,000 credits ($0.25); 1 sent and not billed; 1 billed and lost; 2 possibly billed"
        )

    @pytest.mark.parametrize(
        ("items", "summary"),
        [
            ([], "0 published; 0 calls billed, 0 credits ($0.00)"),
            ([_record("unchanged")], "0 published, 1 already there; 0 calls billed, 0 credits ($0.00)"),
            (
                [_record("published", billed_calls=1, credits_used=168_000)],
                "1 published; 1 call billed, 168,000 credits ($0.08)",
            ),
        ],
    )
    def test_the_summary_leaves_out_zeros(self, items: list[ItemRecord], summary: str, tmp_path: Path) -> None:
        """Except those of published rows, billed calls and credits."""
        assert make_report(items, tmp_path).summary() == summary

    def test_a_report_survives_json(self, report: BatchReport) -> None:
        """As Prefect stores it."""
        assert BatchReport.model_validate_json(report.model_dump_json()) == report

    def test_records_are_read_as_they_were_written(self, tmp_path: Path) -> None:
        """With the values of all other columns, in the table's order."""
        carried = {"tags": ["a", {"b": None}], "price": 1.5, "ünï": "🗝\n"}
        records = [
            _record(status, row, carried=carried, run="run-1") for row, status in ((2, "unchanged"), (1, "failed"))
        ]
        assert make_report(records, tmp_path).items == records[::-1]

    def test_a_failed_batch_keeps_its_report(self, report: BatchReport) -> None:
        """The exception that Prefect pickles with the run's state holds the whole report."""
        failure = pickle.loads(pickle.dumps(BatchFailed("too many", report)))  # noqa: S301 - our own
        assert isinstance(failure, BatchFailed)
        assert (failure.message, failure.report) == ("too many", report)
        assert not failure.retryable

    def test_the_table_has_a_line_for_each_row_and_the_sums(self, report: BatchReport) -> None:
        """With each row's image or error; text from tables is never read as markup."""
        screen = Console(file=io.StringIO(), width=160)
        screen.print(tabulate(report))
        shown = screen.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
        assert shown.count("0.jpg") == 3
        for text in ("row 7: [red]seed[/red] is '0'", "7 rows", "in 12.3 s", "flagged", "unsafe"):
            assert text in shown

    def test_of_a_large_batch_the_table_shows_the_failures(self, tmp_path: Path) -> None:
        """At most a hundred; the footer refers to the manifest for the rest."""
        items = [_record("published", row, images=(_image(),)) for row in range(1, 150)]
        items += [_record("failed", row, error="AnswerLost", message=f"lost {row}") for row in range(150, 260)]
        screen = Console(file=io.StringIO(), width=160)
        screen.print(tabulate(make_report(items, tmp_path)))
        shown = screen.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
        assert shown.count("lost ") == 100
        assert "0.jpg" not in shown
        assert "159 more in the manifest" in shown

    def test_a_row_with_an_error_shows_the_error(self, tmp_path: Path) -> None:
        """Even if some of its images were published."""
        item = _record("failed", images=(_image(),), error="ImageGone", message="image 1 is gone")
        screen = Console(file=io.StringIO(), width=160)
        screen.print(tabulate(make_report([item], tmp_path)))
        assert "image 1 is gone" in screen.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


@pytest.mark.parametrize(
    ("credits_used", "text"),
    [(0, "0 credits ($0.00)"), (2_000_000, "2,000,000 credits ($1.00)"), (168_000.4, "168,000 credits ($0.08)")],
)
def test_credits_are_shown_in_dollars_too(credits_used: float, text: str) -> None:
    """Two million credits are a dollar."""
    assert describe_credits(credits_used) == text


def test_a_fatal_error_is_recorded_like_any_other() -> None:
    """The record of a row that was not sent because the account is empty has that error."""
    record = record_failed(ROW, REQUEST, OutOfCredits("no credits left", status=403))
    assert (record.error, record.message, record.calls) == ("OutOfCredits", "no credits left", 0)
