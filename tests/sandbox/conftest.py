from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox

from .plain_client import PlainClient


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSandbox]:
    """One sandbox for all tests; no S3, no waiting."""
    with start_sandbox(tmp_path_factory.mktemp("sandbox"), s3=False, latency=0) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running: RunningSandbox) -> RunningSandbox:
    """The sandbox, as new."""
    running.control.reset()
    return running


@pytest.fixture
def client(sandbox: RunningSandbox) -> Iterator[PlainClient]:
    """A client of the sandbox."""
    with PlainClient(sandbox) as client:
        yield client


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data folder of a sandbox of one's own."""
    return tmp_path / "data"
