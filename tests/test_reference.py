"""The API reference, built by the command that the README names."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flux_prefect
from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make reference` wrote, with these tests' Python and nothing installed for it."""
    folder = tmp_path_factory.mktemp("reference")
    made = subprocess.run(
        ["make", "--old-file", ".venv/.ready", "reference", f"RUN={sys.executable}", f"REFERENCE={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""  # where pdoc puts its warnings
    return folder


def read(folder: Path, module: str) -> str:
    """The text of a module's page, without its markup."""
    page = folder.joinpath(*module.split(".")).with_suffix(".html").read_text(encoding="utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


@pytest.mark.parametrize("task", ["find_published", "generate_image", "download_image", "upload_to_s3"])
def test_the_tasks_are_in_it(reference: Path, task: str) -> None:
    """Each with its name for Prefect, its arguments and its docstring."""
    page = read(reference, "flux_prefect.tasks")
    assert f"@task(name='{task.replace('_', '-')}'" in page
    assert re.search(rf"async def {task}\( ", page)
    assert "Idempotent and never cached" in page


@pytest.mark.parametrize(
    ("module", "model"),
    [
        ("flux_prefect.api.models", ImageRequest),
        ("flux_prefect.credentials", AimlApiCredentials),
        ("flux_prefect.bucket.image_bucket", ImageBucket),
    ],
)
def test_every_field_is_in_it(
    reference: Path, module: str, model: type[ImageRequest | AimlApiCredentials | ImageBucket]
) -> None:
    """Of the request and of both blocks, with what the form says of it; one that must be given has no default."""
    page = read(reference, module)
    for name, field in model.model_fields.items():
        if name in model.__annotations__:
            assert f"{name}: " in page
            assert field.description is not None
            assert " ".join(field.description.split()) in page
    assert "PydanticUndefined" not in page


def test_every_public_name_is_in_it(reference: Path) -> None:
    """Each name that `flux_prefect` exports, on the page of the module that defines it."""
    anchors = {
        name
        for page in reference.rglob("*.html")
        for name in re.findall(r'<section id="([^"]+)"', page.read_text(encoding="utf-8"))
    }

    assert set(flux_prefect.__all__) - {"__version__"} - anchors == set()


def test_nothing_private_is_in_it(reference: Path) -> None:
    """Neither modules nor names that begin with an underscore, nor the source."""
    pages = list(reference.rglob("*.html"))
    anchors = {
        name for page in pages for name in re.findall(r'<section id="([^"]+)"', page.read_text(encoding="utf-8"))
    }

    assert anchors
    assert [name for name in anchors if re.search(r"(^|\.)_(?!_init__$)", name)] == []
    assert not any(page.name.startswith("_") for page in pages)
    assert "settings_at_import()" not in read(reference, "flux_prefect.tasks")  # a line of its source
