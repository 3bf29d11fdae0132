"""A client with no cleverness: what comes over the wire is what a test sees."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import httpx
from typing_extensions import Self

from flux_prefect.sandbox.launching import RunningSandbox

MODEL = "flux/kontext-max/text-to-image"


class PlainClient:
    """The service over httpx, with the sandbox's key."""

    def __init__(self, sandbox: RunningSandbox) -> None:
        self.http = httpx.Client(
            base_url=sandbox.url,
            headers={"Authorization": f"Bearer {sandbox.environment['AIMLAPI_KEY']}"},
            timeout=5,
            trust_env=False,
        )

    def post(self, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """Ask for an image; fields that are not named are the usual ones."""
        body = {"model": MODEL, "prompt": "A boat on the sea", "seed": 7, **fields}
        return self.http.post("/v1/images/generations", json=body, headers=headers)

    def url(self, **fields: Any) -> str:
        """Ask for one image; where it is."""
        return str(self.post(**fields).raise_for_status().json()["images"][0]["url"])

    def image(self, **fields: Any) -> bytes:
        """Ask for one image and fetch it."""
        return self.http.get(self.url(**fields)).raise_for_status().content

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
