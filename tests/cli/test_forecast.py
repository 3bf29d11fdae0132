"""The command line of the forecast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flux_prefect.cli.app import main


def test_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """Percentages become shares; the numbers are those of the function."""
    assert (
        main(["forecast", "--images", "200", "--latency", "2", "--max-in-flight", "10", "--flagged", "100%", "--json"])
        == 0
    )
    output = json.loads(capsys.readouterr().out)
    assert (output["seconds"], output["flagged"], output["credits"]) == (pytest.approx(40), 200, 40_000_000)


def test_a_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """The table has the cost in dollars and the time in hours."""
    assert main(["forecast", "--images", "10000", "--workers", "4", "--latency", "8", "--shard-size", "500"]) == 0
    output = capsys.readouterr().out
    assert "20, at most 4 at a time" in output
    assert "$1,000.00" in output
    assert "0:42:00" in output


def test_latencies_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has one number a line."""
    file = tmp_path / "seconds.txt"
    file.write_text("3\n3.0\n3e0\n", encoding="utf-8")
    assert main(["forecast", "--images", "8", "--latency", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--latency", "soon"], "latency 'soon' must be a number of seconds"),
        (["--latency", "9:3"], "latency '9:3' must be a number"),
        (["--latency", "1", "--workers", "0"], "workers: Input should be greater than or equal to 1"),
        (["--latency", "1", "--refused", "100"], "never ends"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    arguments: list[str], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is 2, and the message has the reason."""
    assert main(["forecast", "--images", "1", *arguments]) == 2
    assert output in capsys.readouterr().err
