"""What make hands to the tools that it runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from prefect_versions import read_oldest
from support.missing import do_without

ROOT = Path(__file__).parents[2]
INSTALLS = ("venv", "pip sync", "pip install")


def install(folder: Path, **environment: str) -> list[str]:
    """Install as make does, with a uv that notes whether it is to trust the system's certificates; its notes."""
    for name in ("Makefile", "requirements.txt", "requirements-uv.txt", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / ".tools").mkdir()
    (folder / ".tools" / "uv").touch()
    (folder / ".venv").mkdir()
    recorder = folder / "recorder"
    recorder.write_text('#!/bin/sh\necho "$UV_SYSTEM_CERTS $*" >> notes\n', encoding="utf-8")
    recorder.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "MAKE"))}
    subprocess.run(
        ["make", "--silent", ".venv/.ready", f"UV={recorder}"], cwd=folder, env={**clean, **environment}, check=True
    )
    return (folder / "notes").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("environment", "expected"), [({}, "true"), ({"UV_SYSTEM_CERTS": "false"}, "false")])
def test_the_system_s_certificates_count(environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    """Every download of an installation trusts them, as pip's do, unless somebody has chosen otherwise."""
    notes = install(tmp_path, **environment)

    assert len(notes) == len(INSTALLS)
    for note, command in zip(notes, INSTALLS, strict=True):
        assert note.startswith(f"{expected} {command} ")


def test_the_locked_uv_takes_that_variable() -> None:
    """Under another name, its certificates would be the built-in ones again."""
    if not (ROOT / ".tools" / "uv").exists():
        do_without(Exception("uv is not in .tools: make has not been run here"))
    helped = subprocess.run(
        ["make", "--silent", "--eval", "show: ; @$(UV) pip sync --help", "show"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert "UV_SYSTEM_CERTS=" in helped.stdout


def test_the_oldest_prefect_is_the_bound() -> None:
    """What `make test-prefect-versions` installs follows pyproject.toml."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    assert f'"{read_oldest(pyproject).replace("==", ">=")},' in pyproject
