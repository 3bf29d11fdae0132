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

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.settings import FluxSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "deployments" / "docs"
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "deployments").rglob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_snippet(number: int) -> dict[str, Any]:
    """Run one snippet as a module of its own; its names."""
    names: dict[str, Any] = {"__name__": f"readme_{number}"}
    exec(compile(SNIPPETS[number], str(ROOT / "README.md"), "exec"), names)  # noqa: S102 - the README's own code
    return names


@pytest.mark.usefixtures("prefect_server")
async def test_the_flow_of_ones_own_publishes_an_image(sandbox: RunningSandbox) -> None:
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


@pytest.mark.parametrize(
    "command",
    sorted(
        {found for page in PAGES for found in re.findall(r"python -m ([a-z_.]+)", page.read_text(encoding="utf-8"))}
    ),
)
def test_the_commands_exist(command: str) -> None:
    """Each tells its usage."""
    told = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith((f"usage: python -m {command}", "Usage: flux-prefect"))


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


def read_page(name: str) -> str:
    """The text of a page of the documentation."""
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def texts(path: Path) -> Iterator[str]:
    """Every text of a module, as it is told: what is filled in stands as an ellipsis."""
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
    told = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", read_page("settings")))

    assert read - told == set()
    assert {name for name in told - read if name.startswith(("FLUX_", "AIML"))} == set()


def test_the_defaults_in_the_table_are_those_of_the_settings() -> None:
    """As far as they are numbers."""
    table = dict(
        re.findall(r"^\| `FLUX_PREFECT_(\w+)` \|.*\| `?([\[\d][^|`]*?)`? \|$", read_page("settings"), re.MULTILINE)
    )
    told = {name.lower(): ast.literal_eval(value.replace(",000", "000")) for name, value in table.items()}
    defaults = {
        name: field.default for name, field in FluxSettings.model_fields.items() if field.default_factory is None
    }

    assert told == defaults


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
        assert target.is_file(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}, link
