"""The README's Python runs, and its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flux_prefect.bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_snippet(number: int) -> dict[str, Any]:
    """Run one snippet as a module of its own; its names."""
    names: dict[str, Any] = {"__name__": f"readme_{number}"}
    exec(compile(SNIPPETS[number], str(ROOT / "README.md"), "exec"), names)  # noqa: S102 - the README's own code
    return names


@pytest.mark.usefixtures("prefect_server")
async def test_the_flow_of_ones_own_publishes_a_picture(sandbox: RunningSandbox) -> None:
    """Copied as it stands, with the sandbox's environment."""
    names = run_snippet(0)
    uri = await names["publish_cover"]("a lighthouse in the README", 7)

    assert re.fullmatch(r"s3://images/covers/[0-9a-f]{32}-0\.jpg", uri)
    assert sandbox.control.summary().billed_calls == 1


@pytest.mark.usefixtures("prefect_server")
def test_the_blocks_are_saved_for_the_team(sandbox: RunningSandbox) -> None:
    """And can be loaded by name."""
    run_snippet(1)

    credentials, bucket = AimlApiCredentials.load("studio"), ImageBucket.load("catalogue")
    assert isinstance(credentials, AimlApiCredentials)
    assert isinstance(bucket, ImageBucket)
    assert credentials.base_url == sandbox.url
    assert bucket.uri == "s3://images/catalogue"


def test_no_snippet_goes_untested() -> None:
    """A new one needs a test here."""
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m ([a-z_.]+)", README))))
def test_the_commands_exist(command: str) -> None:
    """Each tells its usage."""
    told = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"usage: python -m {command}")


def test_the_blocks_are_registered_by_the_package(prefect_server: str) -> None:
    """`prefect block register -m flux_prefect` finds both."""
    told = subprocess.run(
        [sys.executable, "-m", "prefect", "block", "register", "-m", "flux_prefect"],
        env={**os.environ, "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert "AIMLAPI Credentials" in told.stdout
    assert "Image Bucket" in told.stdout
