"""The short form of `make chaos`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(420)
def test_a_batch_survives_being_killed_again_and_again(prefect_server: str) -> None:
    """Over hosts, attempts and lost answers: every image is whole, paid once, and every account has the same sums."""
    ended = subprocess.run(
        [sys.executable, "tests/chaos.py", "--rows", "80", "--kills", "10"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
