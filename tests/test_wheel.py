"""The wheel, in a virtual environment without this checkout, beside a project that has a folder `flows` of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from fresh_installs import build_wheel
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.sandbox.launching import RunningSandbox

LOCKED = sysconfig.get_path("purelib")
DATA_FILES = (
    "cli/demo_prompts.csv",
    "display/gallery.css",
    "display/gallery.html.j2",
    "display/gallery.js",
    "py.typed",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; its folder.

    It finds the locked packages as well, but not what is installed there as editable: a path in a .pth file is no site
    folder, and .pth files in it do not count.
    """
    folder = tmp_path_factory.mktemp("installed").resolve()
    venv.create(folder, symlinks=True)
    base = f"{sys.base_prefix}/bin/python3"  # it has pip; the locked environment has none
    pip = [base, "-m", "pip", "--isolated", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "locked.pth").write_text(LOCKED, encoding="utf-8")
    return folder


def run(command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]) -> str:
    """Run a command of the environment, without the checkout on any path; its stdout."""
    clean = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def make_project(folder: Path, *, package: bool) -> Path:
    """A project with flows of its own in `flows`, with or without `__init__.py`."""
    (folder / "flows").mkdir(parents=True)
    (folder / "flows" / "theirs.py").write_text("NAME = 'theirs'\n", encoding="utf-8")
    if package:
        (folder / "flows" / "__init__.py").touch()
    return folder


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    """No `flows`, `tests` or `deployments` at the top level; every file that is not Python is in it."""
    names = set(zipfile.ZipFile(wheel).namelist())

    package, information = sorted({name.partition("/")[0] for name in names})
    assert package == "flux_prefect"
    assert information.startswith("flux_prefect-")
    assert information.endswith(".dist-info")
    inside = {name.removeprefix("flux_prefect/") for name in names if name.startswith("flux_prefect/")}
    assert {name for name in inside if not name.endswith(".py")} == set(DATA_FILES)


@pytest.mark.parametrize("package", [True, False], ids=["with __init__.py", "without __init__.py"])
def test_flows_of_a_project_s_own_stay_importable(installed: Path, tmp_path: Path, *, package: bool) -> None:
    """`flows` is theirs, `flux_prefect.flows` comes from the installed wheel."""
    project = make_project(tmp_path / "project", package=package)
    code = (
        "import flows.theirs, flux_prefect\n"
        "from importlib.util import find_spec\n"
        "flow = find_spec('flux_prefect.flows.publish_batch').origin\n"
        "print(flows.theirs.__file__, flux_prefect.__file__, flow, sep='\\n')"
    )

    printed = run([installed / "bin" / "python", "-c", code], project, os.environ)

    theirs, ours, flow = map(Path, printed.splitlines())
    assert theirs == project / "flows" / "theirs.py"
    assert ours.is_relative_to(installed)
    assert flow.is_relative_to(installed)


@pytest.mark.timeout(300)
def test_the_installed_command_publishes_a_table_of_the_project(
    installed: Path, bucket: ImageBucket, sandbox: RunningSandbox, prefect_server: str, tmp_path: Path
) -> None:
    """In the project's folder; stdout is the report as one JSON object."""
    project = make_project(tmp_path / "project", package=True)
    (project / "table.csv").write_text(f"id,prompt,seed\nfox,a fox {uuid4().hex},7\n", encoding="utf-8")
    command = installed / "bin" / "flux-prefect"
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}

    printed = run([command, "publish", "batch", "table.csv", "--bucket", bucket.uri, "--json"], project, environment)

    assert json.loads(printed)["counts"] == {"published": 1}
    assert sandbox.control.summary().billed_calls == 1


@pytest.mark.timeout(300)
def test_a_worker_in_an_empty_folder_runs_what_the_command_deployed(
    installed: Path, bucket: ImageBucket, sandbox: RunningSandbox, prefect_server: str, tmp_path: Path
) -> None:
    """It imports the flow from the installed package: there is no checkout and no pull step."""
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    empty = tmp_path / "empty"
    empty.mkdir()
    name = f"wheel-{uuid4().hex}"
    with SyncPrefectClient(prefect_server) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        command = installed / "bin" / "flux-prefect"
        run([command, "deploy", "publish_image", "--pool", name, "--name", name], empty, environment)
        deployment = client.read_deployment_by_name(f"publish-image/{name}")
        request = {"prompt": f"a fox {uuid4().hex}", "seed": 7, "aspect_ratio": "1:1"}
        started = client.create_flow_run_from_deployment(
            deployment.id, parameters={"request": request, "bucket": bucket.uri}
        )

        python = installed / "bin" / "python"
        log = run([python, "-m", "prefect", "worker", "start", "--pool", name, "--run-once"], empty, environment)

        state = client.read_flow_run(started.id).state
    assert state is not None
    assert state.is_completed(), f"{state!r}\n{log}"
    assert sandbox.control.summary().billed_calls == 1
