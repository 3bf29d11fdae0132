"""The wheel as `pip install` brings it, without the lock, on the oldest and the newest Python: the demo has to run.

`make test-install` runs it. Each Python gets a virtual environment of its own with the newest of all that the wheel's
bounds allow; the demo runs from an empty folder, so that nothing of the checkout is found by chance.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.13")
VERSIONS = """
import sys
from importlib.metadata import version

import flux_prefect

names = ("prefect", "fastapi", "pydantic", "sqlalchemy", "starlette", "boto3", "pillow", "cyclopts")
print("Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in names), flush=True)
print(flux_prefect.__file__, flush=True)
"""


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout into a folder with the locked build back end."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_demo(wheel: Path, python: str, folder: Path) -> int:
    """Install the wheel with its extra `sandbox` for a Python and run the demo; returns its exit status.

    Args:
        wheel: the file.
        python: a version or an interpreter, as uv takes them.
        folder: for the environment and the demo, which must not exist yet.
    """
    uv = os.environ.get("UV", "uv")
    programs = folder / "environment" / "bin"
    for command in (
        f"{uv} venv --quiet --python {python} {programs.parent}",
        f"{uv} pip install --quiet --python {programs / 'python'} '{wheel}[sandbox]'",
    ):
        subprocess.run(["sh", "-c", command], check=True)  # UV is a command of a shell, with variables before it
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([programs / "python", "-c", VERSIONS], cwd=elsewhere, env=environment, check=True)
    return subprocess.run([programs / "flux-prefect", "demo"], cwd=elsewhere, env=environment, check=False).returncode


def main() -> int:
    """The command line; returns the exit status, 0 only if every demo ran."""
    parser = argparse.ArgumentParser(prog="python tests/fresh_installs.py", description="Run the demo from the wheel.")
    parser.add_argument("python", nargs="*", default=PYTHONS, help="versions or interpreters (default: 3.10, 3.13)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flux_prefect-installs-") as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        statuses = [run_demo(wheel, python, folder / str(number)) for number, python in enumerate(given.python)]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
