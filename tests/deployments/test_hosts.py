"""The files for hosts of one's own: systemd units, the Dockerfile and the compose file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support.missing import do_without

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
SOURCES = ("flux_prefect", "pyproject.toml", "README.md", "LICENSE")  # of the wheel
UNITS = sorted((DEPLOYMENTS / "systemd").glob("*.service"))


@pytest.fixture
def compose() -> Any:
    """The compose file; a key that comes twice is refused."""
    return YAML(typ="safe").load(DEPLOYMENTS / "compose.yaml")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.name))
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    """Every directive is known to it and has a value that it takes."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        do_without(Exception("systemd-analyze is not installed"))
    text = unit.read_text(encoding="utf-8")
    copy = tmp_path / unit.name
    copy.write_text(text.replace("/opt/flux/venv/bin/prefect", sys.executable), encoding="utf-8")

    done = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_units_name_commands_that_there_are() -> None:
    """The pool and the options are those of Prefect's own command line."""
    commands = [
        line for unit in UNITS for line in unit.read_text("utf-8").splitlines() if line.startswith("ExecStart=")
    ]
    assert len(commands) == len(UNITS) == 2
    for command in commands:
        words = command.split()[1:]
        verbs = [word for word in words[:2] if not word.startswith("-")]
        helped = subprocess.run(
            [sys.executable, "-m", "prefect", *verbs, "--help"], capture_output=True, text=True, check=True
        )
        assert [word for word in words if word.startswith("--") and word not in helped.stdout] == []


def test_the_units_need_no_checkout() -> None:
    """All of /opt/flux that they name is the environment with the package."""
    named = {path for unit in UNITS for path in re.findall(r"=(/opt/\S*)", unit.read_text("utf-8"))}
    assert named == {"/opt/flux/venv/bin/prefect"}


def test_the_image_holds_the_installed_package_alone() -> None:
    """Its last stage copies only the environment; its first stage gets what the wheel is built from."""
    build, image = (DEPLOYMENTS / "Dockerfile").read_text("utf-8").split("\nFROM ")[1:]
    copied = [word for line in re.findall(r"^COPY (.+)$", build, re.MULTILINE) for word in line.split()[:-1]]
    let_through = re.findall(r"^!(.+)$", (DEPLOYMENTS / "Dockerfile.dockerignore").read_text("utf-8"), re.MULTILINE)

    assert re.findall(r"^(?:COPY|ADD) .+$", image, re.MULTILINE) == ["COPY --from=build /venv /venv"]
    assert sorted(copied) == sorted(let_through) == sorted(["requirements.txt", *SOURCES])


def test_every_service_of_the_compose_file_leads_somewhere(compose: Any) -> None:
    """What it depends on, its volumes and its Dockerfile are there."""
    services = compose["services"]
    assert set(services) == {"postgres", "server", "worker"}
    for service in services.values():
        assert ("image" in service) != ("build" in service)
        for name, depends in service.get("depends_on", {}).items():
            assert depends["condition"] == "service_healthy"
            assert "healthcheck" in services[name]
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"]
        if "build" in service:
            context = DEPLOYMENTS / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).is_file()


def test_the_compose_file_holds_no_secret(compose: Any) -> None:
    """Passwords and keys come from the shell."""
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if any(word in name for word in ("PASSWORD", "KEY")):
                assert value is None or value.startswith("${")
