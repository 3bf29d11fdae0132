from __future__ import annotations

import io
import logging
import sys

import pytest
from support.images import fake_published_image

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.display.progress import Progress, describe_seconds, show_progress
from flux_prefect.manifest.plan import Plan
from flux_prefect.manifest.records import ItemRecord, ItemStatus

LOGGER = logging.getLogger("test_progress")


def _record(status: ItemStatus = "published", message: str | None = None, credits_used: float = 168_000) -> ItemRecord:
    return ItemRecord(
        row=1,
        id="dusk",
        status=status,
        request=ImageRequest(prompt="a lighthouse", seed=7),
        error=None if message is None else "AnswerLost",
        message=message,
        credits_used=credits_used,
    )


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_without_a_terminal_progress_is_logged(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short batch has one line, at its end, without control characters."""
    with caplog.at_level(logging.INFO), show_progress(Progress(3), LOGGER) as add:
        add(_record())
        add(_record("unchanged", credits_used=0))
        assert caplog.messages == []
        add(_record())
    assert caplog.messages == ["3 of 3 done, 336,000 credits ($0.17) so far"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_failure_is_logged_at_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, *, terminal: bool
) -> None:
    """With and without a terminal: the row's id, its status and its error."""
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.WARNING), show_progress(Progress(2), LOGGER) as add:
        add(_record("failed", message="the answer was lost"))
        assert caplog.messages == ["dusk failed: AnswerLost: the answer was lost"]
        add(_record())
    assert len(caplog.messages) == 1


def test_a_terminal_has_a_bar(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows rows and credits, and nothing is logged."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with caplog.at_level(logging.INFO), show_progress(Progress(2), LOGGER) as add:
        add(_record())
        add(_record())
    shown = terminal.getvalue()
    assert "2/2" in shown
    assert "336,000 credits ($0.17)" in shown
    assert caplog.messages == []


def test_only_twenty_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A last line refers to the manifest."""
    with caplog.at_level(logging.INFO), show_progress(Progress(100), LOGGER) as add:
        for _ in range(50):
            add(_record("failed", message="no"))
    assert caplog.messages == [
        *["dusk failed: AnswerLost: no"] * 20,
        "More rows have failed; see the manifest for all of them.",
    ]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def test_only_rows_that_take_time_count_for_the_pace() -> None:
    """Unchanged and invalid rows end at once, and do not affect the estimate for the others."""
    clock = Clock()
    progress = Progress(1000, quick=900, clock=clock)
    assert progress.summary() == "0 of 1,000 done, 0 credits ($0.00) so far"
    for _ in range(600):
        progress.add(_record("unchanged", credits_used=0))
    assert progress.seconds_left is None
    clock.now += 60
    image = fake_published_image(ImageBucket(bucket_name="images"), ImageRequest(prompt="a fox", seed=1))
    for _ in range(20):
        progress.add(_record().model_copy(update={"images": (image,)}))

    assert progress.percent == pytest.approx(62)
    assert progress.images_a_minute == pytest.approx(20)
    assert progress.seconds_left == pytest.approx(240)
    assert progress.summary() == "620 of 1,000 done, 3,360,000 credits ($1.68) so far, 20 images a minute, 4 min left"


def test_rows_that_take_no_time_come_from_the_plan() -> None:
    """They are published or invalid in the plan."""
    plan = Plan(
        rows=10,
        invalid=2,
        published=3,
        repeats=0,
        paid=1,
        requests=4,
        images=4,
        most_credits=0,
        max_credits=None,
        max_images=None,
    )
    clock = Clock()
    progress = Progress.of(plan, clock=clock)
    clock.now += 60
    progress.add(_record())
    assert progress.total == 10
    assert progress.seconds_left == pytest.approx(4 * 60)


def test_a_finished_batch_is_at_100_percent() -> None:
    """So is an empty batch."""
    assert Progress(0).percent == 100
    done = Progress(1)
    done.add(_record())
    assert (done.percent, done.seconds_left) == (100, 0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3570, "1 h 0 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_rounded(seconds: float, text: str) -> None:
    """To seconds or minutes."""
    assert describe_seconds(seconds) == text


def test_an_empty_batch_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """No rows, no lines."""
    with caplog.at_level(logging.INFO), show_progress(Progress(0), LOGGER):
        pass
    assert caplog.messages == []


def test_a_logger_adapter_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    """Prefect's run logger is one."""
    adapter: logging.LoggerAdapter[logging.Logger] = logging.LoggerAdapter(LOGGER, {})
    with caplog.at_level(logging.INFO), show_progress(Progress(1), adapter) as add:
        add(_record())
    assert caplog.messages == ["1 of 1 done, 168,000 credits ($0.08) so far"]
