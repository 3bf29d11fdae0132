"""The pages of the guide are followed from first block to last, on the sandbox, and their stated output is compared."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

from flux_prefect.cli.app import main
from flux_prefect.sandbox.launching import RunningSandbox

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "deployments" / "docs" / f"{name}.md"
    for name in ("getting-started", "your-own-flow", "scheduling", "many-workers")
]
"""In the order in which a reader follows them: each continues the one before."""

BLOCKS: list[tuple[str, str]] = [
    block
    for page in PAGES
    for block in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
]

STAY_UP = {
    "flux-prefect sandbox",
    "prefect server start",
    "jupyter lab",
    "prefect worker start --pool images",
}
"""Commands for terminals of their own. The fixtures take the place of the first two."""

TESTED_ELSEWHERE = {
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install '.[sandbox,parquet]'",
    "flux-prefect demo",
}
"""The installation, which the tests of the wheel and of the demo run."""

_HERE_DOCUMENT = re.compile(
    r"^(cat > (?P<file>\S+)|python -) <<'(?P<mark>\w+)'\n(?P<text>.*?)^(?P=mark)\n", re.MULTILINE | re.DOTALL
)


class Reader:
    """Somebody who follows the guide: one notebook, one shell, one folder."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._names: dict[str, Any] = {"__name__": "notebook"}
        self._environment = environment
        self.exported: set[str] = set()
        self.status = 0

    def follow(self, language: str, block: str) -> None:
        """Run a block; raise where it fails."""
        if language == "python":
            self._run_cell(block)
        elif language == "bash":
            for document in _HERE_DOCUMENT.finditer(block):
                if document["file"] is None:
                    self._run_cell(document["text"])
                else:
                    Path(document["file"]).write_text(document["text"], encoding="utf-8")
            for command in re.sub(r"\s*\\\n\s*", " ", _HERE_DOCUMENT.sub("", block)).splitlines():
                self._run_command(command)

    def _run_cell(self, block: str) -> None:
        code = compile(block, "guide", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, self._names))  # noqa: S307 - the guide's own code
        else:
            exec(code, self._names)  # noqa: S102 - the guide's own code

    def _run_command(self, command: str) -> None:
        if command in STAY_UP | TESTED_ELSEWHERE:
            return
        program, *arguments = shlex.split(command)
        if program == "export":
            self.exported |= {argument.partition("=")[0] for argument in arguments}
        elif program == "flux-prefect":
            self.status = main(arguments)
        else:
            assert program == "prefect"
            done = subprocess.run(
                [sys.executable, "-m", "prefect", *arguments],
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=90,
            )
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.filterwarnings(
    "ignore:'imghdr' is deprecated:DeprecationWarning"
)  # a library under Prefect's SlackWebhook
@pytest.mark.timeout(400)
def test_the_guide_can_be_followed(
    prefect_server: str,
    sandbox: RunningSandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every block does what the text says, to the run that a worker takes from the deployment."""
    monkeypatch.chdir(tmp_path)
    reader = Reader({**os.environ, "PREFECT_API_URL": prefect_server})
    printed = ""
    for language, block in BLOCKS:
        if language == "text":
            assert " ".join(block.split()) in " ".join(printed.split())
            assert reader.status == (1 if block.startswith("Failed") else 0)
        else:
            reader.follow(language, block)
            printed = "".join(capsys.readouterr())

    assert set(sandbox.environment) | {"PREFECT_API_URL"} <= reader.exported
    assert sandbox.control.summary().billed_calls == 11
    with SyncPrefectClient(prefect_server) as client:
        deployment = client.read_deployment_by_name("publish-batch/nightly-covers")
        (run,) = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])))
        assert run.state is not None
        assert run.state.message == "dry run: 4 rows: 0 to generate, 4 already there; at most 0 credits ($0.00)"
        client.delete_deployment(deployment.id)


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "bash"])
def test_a_shell_takes_each_block(block: str) -> None:
    """Also those that only people run."""
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_no_block_goes_untested() -> None:
    """One in another language would be passed over."""
    assert {language for language, _ in BLOCKS} == {"python", "bash", "text"}
