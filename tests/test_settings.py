from __future__ import annotations

import os
from pathlib import Path

import pytest
from prefect.settings import PREFECT_HOME, temporary_settings
from pydantic import ValidationError

from flux_prefect.settings import FluxSettings, current_settings


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any setting of ours."""
    for name in [name for name in os.environ if name.startswith("FLUX_PREFECT_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_spool_is_in_the_prefect_home(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001 - the environment
    """It goes where Prefect's own results go."""
    with temporary_settings({PREFECT_HOME: tmp_path}):
        assert current_settings().spool == tmp_path / "flux_prefect" / "spool"


def test_the_locks_are_not_in_the_prefect_home(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001 - the environment
    """Two Prefect homes on one host exclude each other; two users don't meet."""
    before = current_settings().locks
    with temporary_settings({PREFECT_HOME: tmp_path}):
        assert current_settings().locks == before
    assert str(os.getuid()) in before.name


def test_the_defaults(bare: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - the environment
    """A lost answer is paid for again at most once unless told otherwise."""
    settings = FluxSettings()
    assert settings.retries == 4
    assert settings.retry_delay_seconds == [2, 8, 30, 60]
    assert settings.repeat_unknown == 1


def test_the_environment_decides(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each setting is a variable, and a change counts at once."""
    bare.setenv("FLUX_PREFECT_SPOOL", str(tmp_path))
    bare.setenv("FLUX_PREFECT_LOCKS", str(tmp_path / "locks"))
    bare.setenv("FLUX_PREFECT_RETRIES", "0")
    bare.setenv("FLUX_PREFECT_RETRY_DELAY_SECONDS", "[1, 2.5]")
    bare.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "3")
    assert current_settings() == FluxSettings(
        spool=tmp_path, locks=tmp_path / "locks", retries=0, retry_delay_seconds=[1, 2.5], repeat_unknown=3
    )
    bare.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "0")
    assert current_settings().repeat_unknown == 0


def test_an_empty_variable_is_as_good_as_none(bare: pytest.MonkeyPatch) -> None:
    """A compose file that passes nothing on does not put the spool into the working folder."""
    usual = current_settings()
    for name in FluxSettings.model_fields:
        bare.setenv(f"FLUX_PREFECT_{name.upper()}", "")
    assert current_settings() == usual


def test_folders_are_the_same_wherever_a_run_starts(bare: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> None:
    """A tilde is the user's home, and a relative folder becomes absolute when it is read."""
    bare.setenv("FLUX_PREFECT_SPOOL", "~/spool")
    bare.setenv("FLUX_PREFECT_LOCKS", "locks")
    bare.chdir(tmp_path)
    assert current_settings().spool == home / "spool"
    assert current_settings().locks == tmp_path / "locks"


@pytest.mark.parametrize(
    ("name", "value"),
    [("RETRIES", "-1"), ("REPEAT_UNKNOWN", "-1"), ("RETRY_DELAY_SECONDS", "[]"), ("RETRY_DELAY_SECONDS", "[-2]")],
)
def test_a_bad_value_is_refused(bare: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Nonsense is an error with the setting's name, not a run that behaves oddly."""
    bare.setenv(f"FLUX_PREFECT_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        current_settings()


def test_settings_do_not_change_under_a_run() -> None:
    """They are frozen."""
    with pytest.raises(ValidationError, match="frozen"):
        current_settings().retries = 9  # type: ignore[misc]  # what the test is about
