"""The README's Python runs, its commands and links exist, and its settings and messages are those of the code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prefect
import pytest
from test_layers import FLOORS

from flux_prefect.cli.app import main as flux_prefect_command
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.settings import FluxSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "deployments" / "docs"
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "deployments").rglob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("prefect_server")
async def test_the_flow_of_ones_own_publishes_an_image(sandbox: RunningSandbox) -> None:
    """Copied as it stands, with the sandbox's environment."""
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(SNIPPETS[0], str(ROOT / "README.md"), "exec"), names)  # noqa: S102 - the README's own code
    uri = await names["publish_cover"]("a lighthouse in the README", 7)

    assert re.fullmatch(r"s3://images/covers/[0-9a-f]{32}-0\.jpg", uri)
    assert sandbox.control.summary().billed_calls == 1


def test_the_readme_is_short() -> None:
    """At most 900 words, with one snippet that has one import line of the package."""
    assert len(README.split()) <= 900
    (snippet,) = SNIPPETS
    assert len(re.findall(r"^(?:from|import) flux_prefect\b", snippet, re.MULTILINE)) == 1


def test_every_page_is_in_the_readme() -> None:
    """A reader of the README reaches each page of the documentation in one step."""
    linked = {ROOT / link for link in re.findall(r"\]\(([^)#\s]+)\)", README)}

    assert set(DOCS.glob("*.md")) <= linked


def find_commands() -> dict[str, set[str]]:
    """The commands that the pages show, each with the options that they show with it."""
    commands: dict[str, set[str]] = {}
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        for words, rest in re.findall(r"flux-prefect((?: [a-z]+)+)(?=[\s`])([^\n`]*)", text):
            commands.setdefault(words.strip(), set()).update(re.findall(r"--[a-z-]+", rest))
    return commands


COMMANDS = find_commands()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has the options that a page shows with it."""
    try:
        status: object = flux_prefect_command([*command.split(), "--help"])
    except SystemExit as end:  # of a parser of the command's own
        status = end.code
    assert status == 0

    usage = capsys.readouterr().out
    assert f"flux-prefect {command}" in usage
    assert COMMANDS[command] <= {*re.findall(r"--[a-z-]+", usage), "--version"}


@pytest.mark.parametrize(
    "module",
    sorted(
        {
            module
            for page in DOCS.glob("*.md")
            for module in re.findall(r"python -m ([a-z_.]+)", page.read_text(encoding="utf-8"))
        }
    ),
)
def test_the_modules_can_be_run(module: str) -> None:
    """Those that a page names outside of `flux-prefect`."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {module}")


def test_the_blocks_are_registered_by_the_package(prefect_server: str) -> None:
    """`prefect block register -m flux_prefect` finds both."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "block", "register", "-m", "flux_prefect"],
        env={**os.environ, "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AIMLAPI Credentials" in done.stdout
    assert "Image Bucket" in done.stdout


def read_page(name: str) -> str:
    """The text of a page of the documentation."""
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def texts(path: Path) -> Iterator[str]:
    """Every text of a module, with an ellipsis for each value that is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ClassDef):
            yield node.name


def our_files() -> list[Path]:
    """The source of everything that prints."""
    return [*(ROOT / "flux_prefect").rglob("*.py"), *(ROOT / "flows").glob("*.py")]


def test_every_setting_is_in_the_table() -> None:
    """Those of a host, the account's, and the sandbox's."""
    read = {f"FLUX_PREFECT_{name.upper()}" for name in FluxSettings.model_fields}
    for path in our_files():
        for text in texts(path):
            read |= set(re.findall(r"\b(?:AIML_?API|FLUX_SANDBOX)_[A-Z0-9_]*[A-Z0-9]\b", text))
    listed = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", read_page("settings")))

    assert read - listed == set()
    assert {name for name in listed - read if name.startswith(("FLUX_", "AIML"))} == set()


def test_the_defaults_in_the_table_are_those_of_the_settings() -> None:
    """As far as they are numbers."""
    table = dict(
        re.findall(r"^\| `FLUX_PREFECT_(\w+)` \|.*\| `?([\[\d][^|`]*?)`? \|$", read_page("settings"), re.MULTILINE)
    )
    listed = {name.lower(): ast.literal_eval(value.replace(",000", "000")) for name, value in table.items()}
    defaults = {
        name: field.default
        for name, field in FluxSettings.model_fields.items()
        if field.default_factory is None and field.default is not None
    }

    assert listed == defaults


def test_the_symptoms_are_what_the_code_prints() -> None:
    """Each message that is quoted before an arrow stands in the source, here or in Prefect."""
    theirs = [Path(prefect.__file__).parent / name for name in ("blocks/core.py", "states.py")]
    printed = "\n".join(text for path in [*our_files(), *theirs] for text in texts(path))
    symptoms = re.findall(r"^- (.*?) → ", read_page("troubleshooting"), re.MULTILINE | re.DOTALL)
    quoted = [" ".join(quote.split()) for symptom in symptoms for quote in re.findall(r"`([^`]+)`", symptom)]

    assert len(symptoms) >= 17
    assert [quote for quote in quoted if quote not in printed] == []


def test_the_drawing_of_the_house_has_every_floor() -> None:
    """The floors of the layer test, from the top down."""
    drawing = re.search(r"^```text\n(.*?)^```$", read_page("ARCHITECTURE"), re.MULTILINE | re.DOTALL)
    assert drawing is not None
    drawn = [tuple(re.split(r"\s{2,}", line)[0].split(", ")) for line in drawing[1].splitlines()]

    assert drawn == list(reversed(FLOORS))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_somewhere(page: Path) -> None:
    """To files beside the page, and to headings in them."""
    text = page.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}, link
