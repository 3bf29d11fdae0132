from __future__ import annotations

import io
import logging
import sys

import pytest

from flux_prefect.api.models import ImageRequest
from flux_prefect.batch.progress import show_progress
from flux_prefect.batch.report import ItemRecord, ItemStatus

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
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        """It says so."""
        return True


def test_plain_lines_where_nobody_watches(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal a short batch is told once, at its end, in the log and without any control characters."""
    with caplog.at_level(logging.INFO), show_progress(3, LOGGER) as tell:
        tell(_record())
        tell(_record("unchanged", credits_used=0))
        assert caplog.messages == []
        tell(_record())
    assert caplog.messages == ["3 of 3 done, 336,000 credits ($0.17) so far"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_failure_is_told_at_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, *, terminal: bool
) -> None:
    """In both forms: which item, how it ended and why."""
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.WARNING), show_progress(2, LOGGER) as tell:
        tell(_record("failed", message="the answer was lost"))
        assert caplog.messages == ["dusk failed: AnswerLost: the answer was lost"]
        tell(_record())
    assert len(caplog.messages) == 1


def test_a_bar_where_somebody_watches(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal the bar shows items and money, and the log stays quiet."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with caplog.at_level(logging.INFO), show_progress(2, LOGGER) as tell:
        tell(_record())
        tell(_record())
    shown = terminal.getvalue()
    assert "2/2" in shown
    assert "336,000 credits ($0.17)" in shown
    assert caplog.messages == []


def test_an_empty_batch_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """No items, no lines."""
    with caplog.at_level(logging.INFO), show_progress(0, LOGGER):
        pass
    assert caplog.messages == []


def test_a_run_logger_will_do(caplog: pytest.LogCaptureFixture) -> None:
    """Prefect gives runs an adapter instead of a logger."""
    adapter: logging.LoggerAdapter[logging.Logger] = logging.LoggerAdapter(LOGGER, {})
    with caplog.at_level(logging.INFO), show_progress(1, adapter) as tell:
        tell(_record())
    assert caplog.messages == ["1 of 1 done, 168,000 credits ($0.08) so far"]
