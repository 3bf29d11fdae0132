"""The account at the image service, as a Prefect block."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import ClassVar

import httpx
from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client as get_prefect_client
from prefect.concurrency.asyncio import concurrency
from prefect.exceptions import ObjectNotFound
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator

from flux_prefect.api.client import AimlApiClient, Timeouts
from flux_prefect.api.models import normalize_endpoint
from flux_prefect.api.pacing import shared_pacer
from flux_prefect.errors import NotSent
from flux_prefect.settings import current_settings

__all__ = ["DEFAULT_BASE_URL", "AimlApiCredentials"]

_logger = logging.getLogger(__name__)

DEFAULT_BASE_URL = "https://api.aimlapi.com"

_STALL_SECONDS = 60.0  # without a byte, after which a download is abandoned

_KEY_VARIABLES = ("AIMLAPI_KEY", "AIML_API_KEY")

_open_client: ContextVar[tuple[AimlApiCredentials, asyncio.AbstractEventLoop, AimlApiClient] | None] = ContextVar(
    "open_client", default=None
)


class AimlApiCredentials(CredentialsBlock):
    """An account at the AI/ML API: the key, the service's address, and the time-outs and limits of its calls.

    Example:
        Load stored credentials and generate an image in a sync flow:
        ```python
        from flux_prefect import AimlApiCredentials, ImageRequest, generate_image

        credentials = AimlApiCredentials.load("BLOCK_NAME")
        request = ImageRequest(prompt="a lighthouse at dusk", seed=7)
        generation = generate_image.submit(request, credentials).result()
        ```
    """

    _block_type_name: ClassVar[str | None] = "AIMLAPI Credentials"
    _block_type_slug: ClassVar[str | None] = "aimlapi-credentials"
    # The logo that Prefect itself hosts for secrets.
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl(str(Secret._logo_url))  # noqa: SLF001 - Prefect's own protocol
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://docs.aimlapi.com/quickstart/setting-up")

    model_config = ConfigDict(hide_input_in_errors=True)  # the input of a bad block holds its key

    api_key: SecretStr = Field(title="API key", min_length=1, description="The service's bearer token.")
    base_url: str = Field(
        default=DEFAULT_BASE_URL,
        title="Base URL",
        description="The root URL of the service, without /v1. Images are cached per root URL.",
    )
    max_in_flight: int = Field(
        default=16,
        ge=1,
        le=1000,
        description="Most paid calls at once, per process. Lowered while the service refuses calls, then raised again.",
    )
    concurrency_limit: str | None = Field(
        default=None,
        description=(
            "A Prefect global concurrency limit. Every paid call takes one of its slots, over all workers. Costs a "
            "tenth of a second a call."
        ),
    )
    connect_timeout: float = Field(default=10, gt=0, description="Seconds to wait for a connection.")
    read_timeout: float = Field(
        default=300, gt=0, description="Seconds without a byte after which a response counts as lost."
    )
    generation_timeout: float = Field(default=600, gt=0, description="Seconds that one paid call may take in total.")
    download_timeout: float = Field(default=300, gt=0, description="Seconds that one download may take in total.")
    pacing_timeout: float = Field(
        default=600, gt=0, description="Seconds that a call may wait while the service refuses calls."
    )

    @field_validator("base_url")
    @classmethod
    def _root_url(cls, base_url: str) -> str:
        base_url = normalize_endpoint(base_url)
        if not base_url.startswith(("https://", "http://")):
            raise ValueError(f"base_url {base_url!r} is not a web address: write it as {DEFAULT_BASE_URL}")
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url {base_url!r} is not a URL: {error}") from error
        if not url.host or url.userinfo or url.query or url.fragment:
            raise ValueError("base_url must be a host and an optional path: no user, no query")
        if base_url.endswith(("/v1", "/v2")):
            raise ValueError(f"base_url {base_url!r} includes a version: use the root, {base_url[:-3]}")
        return base_url

    @classmethod
    def from_env(cls) -> AimlApiCredentials:
        """Read the account from the environment: `AIMLAPI_KEY` (or `AIML_API_KEY`) and `AIMLAPI_BASE_URL`.

        Raises:
            ValueError: no key is set.
        """
        key = next((value for name in _KEY_VARIABLES if (value := os.environ.get(name))), None)
        if key is None:
            raise ValueError("No API key: set AIMLAPI_KEY (or AIML_API_KEY), or name a saved AimlApiCredentials block.")
        return cls(api_key=SecretStr(key), base_url=os.environ.get("AIMLAPI_BASE_URL") or DEFAULT_BASE_URL)

    @classmethod
    async def resolve(cls, credentials: AimlApiCredentials | str | None) -> AimlApiCredentials:
        """Resolve a block, the name of a saved block, or None for the account in the environment.

        Raises:
            ValueError: no block has that name, or the environment has no key.
        """
        if credentials is None:
            return cls.from_env()
        if isinstance(credentials, str):
            return await cls.aload(credentials)
        return credentials

    def get_client(self) -> AimlApiClient:
        """Create a client of the service, for one `async with` block on one event loop.

        All clients of a process share the in-flight limit of their account.
        """
        settings = current_settings()
        return AimlApiClient(
            api_key=self.api_key,
            base_url=self.base_url,
            timeouts=Timeouts(
                connect=self.connect_timeout,
                read=self.read_timeout,
                generation=self.generation_timeout,
                pacing=self.pacing_timeout,
                download=self.download_timeout,
                download_read=min(_STALL_SECONDS, self.download_timeout),
                url_settling=settings.url_settling_seconds,
                url_life=settings.url_life_seconds,
            ),
            pacer=shared_pacer(self.base_url, self.api_key, self.max_in_flight),
            gate=nullcontext if self.concurrency_limit is None else partial(_take_slot, self.concurrency_limit),
        )

    async def check(self) -> None:
        """Verify that the concurrency limit exists, if one is named. Prefect itself ignores a missing one.

        Raises:
            ValueError: it is missing. The message has the command that creates it.
        """
        if self.concurrency_limit is None:
            return
        async with get_prefect_client() as prefect:
            try:
                await prefect.read_global_concurrency_limit_by_name(self.concurrency_limit)
            except ObjectNotFound as error:
                raise ValueError(
                    f"concurrency_limit {self.concurrency_limit!r} does not exist: create it with `prefect gcl create "
                    f"{self.concurrency_limit} --limit {self.max_in_flight}`, or leave the field empty."
                ) from error

    @asynccontextmanager
    async def open_client(self) -> AsyncIterator[AimlApiClient]:
        """Reuse the client of an enclosing `open_client` for the same account and event loop, or open a new one.

        A flow that opens it once around its work lets all of its tasks share connections.
        """
        loop = asyncio.get_running_loop()
        enclosing = _open_client.get()
        if enclosing is not None and enclosing[0] == self and enclosing[1] is loop:
            yield enclosing[2]
            return
        async with self.get_client() as client:
            token = _open_client.set((self, loop, client))
            try:
                yield client
            finally:
                _open_client.reset(token)


@asynccontextmanager
async def _take_slot(limit: str) -> AsyncIterator[None]:
    slot = concurrency(limit)
    try:
        await slot.__aenter__()
    except Exception as error:
        raise NotSent(
            f"No slot of the concurrency limit {limit!r} could be acquired ({error}): nothing was sent. "
            "Check that the Prefect server can be reached."
        ) from error
    try:
        yield
    finally:
        try:
            await slot.__aexit__(None, None, None)
        except Exception:  # the call is complete, and its response counts
            _logger.exception("A slot of the concurrency limit %r was not released; its lease will expire", limit)
