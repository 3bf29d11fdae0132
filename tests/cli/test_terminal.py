from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flux_prefect.cli.terminal import run_to_state


class Heard(logging.Handler):
    """What reaches the root logger's handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[Heard]:
    """As of a program that calls the command line and has logging of its own."""
    handler = Heard()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


async def _say(*, fail: bool = False) -> State[None]:
    logger = logging.getLogger("a library")
    logger.setLevel(logging.INFO)
    logger.info("chatter")
    logger.warning("trouble")
    if fail:
        raise RuntimeError("no state came")
    return Completed()


def test_only_what_is_worth_a_line_is_shown_while_the_flow_runs(heard: Heard) -> None:
    """The libraries' own lines are not; afterwards the process logs as it did before."""
    assert run_to_state(_say).is_completed()
    logging.getLogger("a library").info("later")
    assert heard.lines == ["trouble", "later"]


def test_also_after_a_failure_the_process_logs_as_before(heard: Heard) -> None:
    """One filter left behind would take the lines of whatever runs next."""
    with pytest.raises(RuntimeError, match="no state came"):
        run_to_state(partial(_say, fail=True))
    logging.getLogger("a library").info("later")
    assert heard.lines == ["trouble", "later"]
