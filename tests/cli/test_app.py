"""The command flux-prefect as a whole: its start, its help, its exit statuses, its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.nursery import Nursery

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.cli.app import main
from flux_prefect.flows.publish_batch import publish_batch

COMMAND = [sys.executable, "-m", "flux_prefect.cli"]
NO_SERVER = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_it_starts_without_prefect(option: str) -> None:
    """Help must not wait the two seconds that importing Prefect takes."""
    code = f"import sys; from flux_prefect.cli.app import main; main([{option!r}]); sys.exit('prefect' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert (version("flux_prefect") if option == "--version" else "publish") in ended.stdout


def test_help_is_the_flow_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Each option is described by the text of its field in the form."""
    assert main(["publish", "batch", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, field in publish_batch.parameters.properties.items():
        assert (name.upper() if name == "source" else f"--{name.replace('_', '-')}") in shown
        assert " ".join(field["description"].split()) in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nothing"], "nothing"),
        (["publish", "batch", "prompts.csv"], "--bucket"),
        (["publish", "batch", "prompts.csv", "--bucket", "s3://a/b", "--max-in-flight", "0"], "--max-in-flight is 0"),
        (["publish", "batch", "prompts.csv", "--bucket", "s3://a/b", "--density", "thick"], "--density"),
        (["publish", "daily", "x.csv", "--bucket", "s3://a/b", "--timezone", "Mars/Base"], "--timezone is 'Mars/Base'"),
        (["sweep", "a fox", "--bucket", "s3://a/b", "--seeds", "a-b"], "--seeds: 'a-b': write numbers and ranges"),
        (
            ["sweep", "a fox", "--bucket", "s3://a/b", "--seeds", "1-400000000"],
            "--seeds: '1-400000000' are 400,000,000 seeds: a sweep has at most 1,000 images",
        ),
    ],
)
def test_misuse_ends_with_2(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the option and what is allowed, on stderr."""
    assert main(arguments) == 2
    ended = capsys.readouterr()
    assert reason in " ".join(ended.err.replace("│", " ").split())
    assert ended.out == ""


def test_json_is_one_object_on_stdout(nursery: Nursery, bucket: ImageBucket, tmp_path: Path) -> None:
    """All else is on stderr."""
    table = tmp_path / "prompts.csv"
    table.write_text("id,prompt,seed\nfox,a fox,7\n", encoding="utf-8")
    ended = nursery.run("publish", "batch", str(table), "--bucket", bucket.uri, "--json")

    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["counts"] == {"published": 1}
    assert report["items"][0]["images"][0]["bucket"] == bucket.bucket_name
    assert "Completed: 1 published" in ended.stderr


def test_a_temporary_server_that_does_not_start_ends_with_2(tmp_path: Path) -> None:
    """It says at once what it starts and how to name a server; then what to do, without a traceback."""
    ended = subprocess.run(
        [*COMMAND, "publish", "batch", "prompts.csv", "--bucket", "s3://images/never"],
        env={**NO_SERVER, "PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 2
    assert "PREFECT_API_URL is not set: starting a temporary Prefect server" in ended.stderr
    assert "did not start within 1 s" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_temporary_server_gets_three_minutes(tmp_path: Path) -> None:
    """Prefect's own limit is what the migrations of a new home take; a limit of the user's own stays."""
    code = (
        "from flux_prefect.cli.temporary_server import temporary_server\n"
        "from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS as limit\n"
        "from prefect.client.orchestration import get_client\n"
        "with temporary_server(), get_client(sync_client=True) as prefect:\n"
        "    print(limit.value(), prefect.hello().status_code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**NO_SERVER, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=170,
    )
    assert ended.stdout.strip() == "180 200"
