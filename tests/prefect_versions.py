"""The core tests on the oldest Prefect that is allowed, and on the newest: what a user gets without the lock.

`make test-prefect-versions` runs it. Each Prefect comes with the newest of all else that its own bounds and ours allow,
in a virtual environment of its own that is deleted at the end.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = re.compile(r'^    "(prefect)>=([\d.]+),', re.MULTILINE)
NEEDED = ("pytest>=8.3", "pytest-asyncio>=1.0", "pytest-timeout>=2.3")
CORE = (
    "tests/test_cache_policies.py",
    "tests/test_tasks.py",
    "tests/test_pipeline.py",
    "tests/flows/test_publish_image.py",
)
"""Cache policies, tasks, an image's whole way, and a flow with its form, from Python and from a shell."""


def read_oldest(pyproject: str) -> str:
    """The oldest Prefect that pyproject.toml allows, as a requirement."""
    (found,) = BOUND.findall(pyproject)
    return "==".join(found)


def run_core_tests(prefect: str, folder: Path) -> int:
    """Run them with this Prefect; returns pytest's exit status.

    Args:
        prefect: a requirement.
        folder: for its environment, which must not exist yet.
    """
    uv = os.environ.get("UV", "uv")
    python = str(folder / "bin" / "python")
    for command in (
        f"{uv} venv --quiet --python {sys.executable} {folder}",
        f"{uv} pip install --quiet --python {python} '{prefect}' '{ROOT}[sandbox]' {' '.join(map(repr, NEEDED))}",
    ):
        subprocess.run(["sh", "-c", command], check=True)  # UV is a command of a shell, with variables before it
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", "import prefect; print('Prefect', prefect.__version__, flush=True)"], check=True)
    # Warnings count on the locked packages alone: an old Prefect beside newer packages warns of what is none of ours.
    pytest = [python, "-m", "pytest", "--quiet", "--override-ini", "filterwarnings=", "-W", "ignore", *CORE]
    return subprocess.run(pytest, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """The command line; returns the exit status, 0 only where all have passed."""
    parser = argparse.ArgumentParser(prog="python tests/prefect_versions.py", description="Run the core tests.")
    parser.add_argument("prefect", nargs="*", help="requirements, such as prefect==3.8.8 (default: oldest, newest)")
    given = parser.parse_args()
    oldest = read_oldest((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="flux_prefect-versions-") as folder:
        statuses = [
            run_core_tests(prefect, Path(folder) / str(number))
            for number, prefect in enumerate(given.prefect or [oldest, "prefect"])
        ]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
