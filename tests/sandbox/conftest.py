from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox

MODEL = "flux/kontext-max/text-to-image"


class Client:
    """What a plain HTTP client of the service does, and nothing cleverer."""

    def __init__(self, sandbox: RunningSandbox) -> None:
        self.sandbox = sandbox
        self.http = httpx.Client(
            base_url=sandbox.url,
            headers={"Authorization": f"Bearer {sandbox.environment['AIMLAPI_KEY']}"},
            timeout=5,
            trust_env=False,
        )

    def post(self, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """Ask for a picture; fields that are not named are the test's usual ones."""
        body = {"model": MODEL, "prompt": "A boat on the sea", "seed": 7, **fields}
        return self.http.post("/v1/images/generations", json=body, headers=headers)

    def picture(self, **fields: Any) -> bytes:
        """Ask for one picture and fetch it."""
        return self.http.get(self.post(**fields).json()["images"][0]["url"]).raise_for_status().content


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
def client(sandbox: RunningSandbox) -> Iterator[Client]:
    """A client of the sandbox."""
    client = Client(sandbox)
    with client.http:
        yield client


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data folder of a sandbox of one's own."""
    return tmp_path / "data"
