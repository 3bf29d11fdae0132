from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_HOME, temporary_settings
from pydantic import ValidationError

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.cli.app import main
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import InvalidSettings
from flux_prefect.pipeline import produce_image
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.settings import FluxSettings, current_settings, settings_at_import

ROOT = Path(__file__).parents[1]


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
    (before,) = current_settings().lock_folders
    with temporary_settings({PREFECT_HOME: tmp_path}):
        assert current_settings().lock_folders == (before,)
    assert str(os.getuid()) in before.name


def test_the_locks_go_with_a_spool_that_is_set(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As well as with the host: containers may share the one or the other. FLUX_PREFECT_LOCKS replaces both."""
    of_host = current_settings().lock_folders
    bare.setenv("FLUX_PREFECT_SPOOL", str(tmp_path / "spool"))
    assert current_settings().lock_folders == (*of_host, tmp_path / "spool" / "locks")
    bare.setenv("FLUX_PREFECT_LOCKS", str(tmp_path / "locks"))
    assert current_settings().lock_folders == (tmp_path / "locks",)


def test_the_defaults(bare: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - the environment
    """A lost answer is paid for again at most once unless set otherwise."""
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


WHOLE, NUMBER, LIST = "a whole number, 0 or more", "a number, 0 or more", "a list of numbers, 0 or more each"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("RETRIES", "-1", WHOLE),
        ("RETRIES", "many", WHOLE),
        ("REPEAT_UNKNOWN", "1.5", WHOLE),
        ("CREDITS_PER_IMAGE", "nan", NUMBER),
        ("GRACE_SECONDS", "inf", NUMBER),
        ("RETRY_DELAY_SECONDS", "[]", LIST),
        ("RETRY_DELAY_SECONDS", "[-2]", LIST),
        ("RETRY_DELAY_SECONDS", "2,8", LIST),
        ("SPOOL", "~no-such-user/spool", "the path of a folder"),
    ],
)
def test_a_bad_value_is_refused(bare: pytest.MonkeyPatch, name: str, value: str, allowed: str) -> None:
    """Nonsense is an error with the variable, the value and what is allowed, not a run that behaves oddly."""
    bare.setenv(f"FLUX_PREFECT_{name}", value)
    with pytest.raises(InvalidSettings, match=re.escape(f"FLUX_PREFECT_{name} is {value!r}: write {allowed}")):
        current_settings()


def test_all_bad_values_are_reported_at_once(bare: pytest.MonkeyPatch) -> None:
    """Each with its own reason."""
    bare.setenv("FLUX_PREFECT_RETRIES", "x")
    bare.setenv("FLUX_PREFECT_GRACE_SECONDS", "y")
    with pytest.raises(InvalidSettings, match=r"_RETRIES is 'x'.*_GRACE_SECONDS is 'y'"):
        current_settings()


async def test_a_run_with_a_bad_setting_fails_before_it_pays(
    monkeypatch: pytest.MonkeyPatch,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    sandbox: RunningSandbox,
) -> None:
    """Importing the tasks works; paying with them raises the reason first."""
    monkeypatch.setenv("FLUX_PREFECT_RETRIES", "x")
    assert settings_at_import().retries == 4
    with pytest.raises(InvalidSettings, match="FLUX_PREFECT_RETRIES is 'x'"):
        await produce_image(request_, bucket, credentials)
    assert sandbox.control.summary().calls == 0


COMMANDS = [
    "publish image lighthouse",
    "publish batch prompts.csv",
    "publish sharded prompts.csv",
    "publish daily products.csv",
    "backfill products.csv --start 2026-03-01 --end 2026-03-02",
    "sweep lighthouse",
    "audit manifest.jsonl",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_ends_with_the_reason(
    command: str, bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the status of a wrong argument, before anything is started."""
    bare.setenv("FLUX_PREFECT_RETRIES", "x")
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--bucket", "s3://images/never"])

    assert ended.value.code == 2
    assert capsys.readouterr().err == "FLUX_PREFECT_RETRIES is 'x': write a whole number, 0 or more, or unset it.\n"


@pytest.mark.parametrize(
    "command",
    [["flux_prefect.cli", "publish", "image", "a lighthouse", "--bucket", "s3://x/y"], ["deployments.serve"]],
)
def test_a_process_ends_without_a_traceback(command: list[str]) -> None:
    """Also where modules read the settings when they are imported."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "FLUX_PREFECT_RETRY_DELAY_SECONDS": "2,8"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "FLUX_PREFECT_RETRY_DELAY_SECONDS is '2,8': write a list of numbers, 0 or more each, such as [2, 8, 30, 60], "
        "or unset it.\n"
    )


def test_settings_do_not_change_under_a_run() -> None:
    """They are frozen."""
    with pytest.raises(ValidationError, match="frozen"):
        current_settings().retries = 9  # type: ignore[misc]  # what the test is about
