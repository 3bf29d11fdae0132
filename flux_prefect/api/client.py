"""The client of the image service. It never repeats a call that may have been paid for."""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard
from uuid import uuid4

import anyio
import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from typing_extensions import Self

from flux_prefect.api.answers import RawAnswer, read_answer, read_json
from flux_prefect.api.catalogue import (
    DEPRECATIONS_PATH,
    MODELS_PATH,
    Deprecation,
    parse_deprecations,
    parse_price,
)
from flux_prefect.api.downloads import DownloadedImage, Downloader
from flux_prefect.api.encoding import receive, unpack
from flux_prefect.api.error_responses import parse_error_response
from flux_prefect.api.images import ExpectedShape
from flux_prefect.api.models import (
    CREDITS_PER_USD,
    GENERATIONS_PATH,
    Balance,
    Generation,
    ImageRequest,
    LogEntry,
    OutputFormat,
    normalize_endpoint,
    parse_log,
)
from flux_prefect.api.pacing import Pacer, PacingTimeout
from flux_prefect.api.retrying import backoff
from flux_prefect.api.transport import find_proxy, open_transport, send
from flux_prefect.errors import (
    AnswerLost,
    Billed,
    InvalidResponse,
    InvalidSettings,
    NotFound,
    NotSent,
    RateLimited,
    ServiceBusy,
    StatusError,
)

__all__ = ["LOG_PAGE_ROWS", "MAX_PIXELS", "AimlApiClient", "Timeouts"]

BALANCE_PATH = "/v2/billing"
OLD_BALANCE_PATH = "/v1/billing/balance"
LOGS_PATH = "/v2/logs"

LOG_PAGE_ROWS = 100
"""Rows of the log per request: the most that the service allows."""

MAX_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 64_000_000

_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KEY = re.compile(r"[\x21-\x7e]+")  # what a header can hold; the HTTP library's errors would quote anything else
_ENVELOPE = 1024 * 1024  # bytes of a response in addition to its images
_REFUSAL = 64 * 1024  # bytes read of an error's body
_REFUSAL_SECONDS = 10.0  # for that body, once the status is known
_LOG_PAGE = 16 * 1024 * 1024  # bytes; a documented row has about 400, and may grow. Lists of models are smaller
_ENQUIRY_SECONDS = 60.0  # for the balance, or for a page of the log
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds, if the service requests no delay

_HEADERS = {"User-Agent": "flux_prefect", "Accept": "application/json", "Accept-Encoding": "identity"}

_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.WriteError,
    httpx.WriteTimeout,
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
)


class Timeouts(BaseModel):
    """Time-outs of the client, in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect: float = Field(default=10, gt=0, allow_inf_nan=False, description="For a connection, including TLS.")
    read: float = Field(default=300, gt=0, allow_inf_nan=False, description="Between two reads of a response.")
    generation: float = Field(
        default=600, gt=0, allow_inf_nan=False, description="For one paid call in total, without waiting for a slot."
    )
    pacing: float = Field(
        default=600, ge=0, allow_inf_nan=False, description="For waiting out a call's 429 and 503 refusals."
    )
    download_read: float = Field(default=60, gt=0, allow_inf_nan=False, description="Between two reads of an image.")
    download: float = Field(default=300, gt=0, allow_inf_nan=False, description="For one image in total.")
    url_settling: float = Field(
        default=10, ge=0, allow_inf_nan=False, description="After delivery, in which a 404 may pass."
    )
    url_life: float = Field(
        default=600, ge=0, allow_inf_nan=False, description="After delivery, in which a refusal is no death of the URL."
    )


class AimlApiClient:
    """A client of the AI/ML API's image generation, for one event loop.

    Example:
        ```python
        async with AimlApiClient(api_key=key, base_url=url, pacer=shared_pacer(url, key, 16)) as client:
            generation = await client.generate(ImageRequest(prompt="a lighthouse at dusk", seed=7))
            print(generation.images[0].url, await client.balance())
        ```

    Args:
        api_key: the bearer token. Sent to `base_url` only, and never part of an error or a log.
        base_url: the root URL of the service, without /v1.
        pacer: the in-flight limit, shared by all clients of the process: see `shared_pacer`.
        timeouts: the time-outs; the defaults if None.
        max_bytes: the most bytes of one image.
        max_pixels: the most pixels of one image.
        gate: a context manager entered around each send of a paid call, while the call holds its slot of the pacer:
            a limit over several processes. An exception from it stops the call.
        transport: replaces the network to the service, for tests.
        download_transport: replaces the network to the images' hosts, for tests.

    Raises:
        ValueError: `api_key` can't be sent in a header, or `base_url` is not a root URL.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each one a setting
        self,
        *,
        api_key: SecretStr,
        base_url: str,
        pacer: Pacer,
        timeouts: Timeouts | None = None,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        gate: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        transport: httpx.AsyncBaseTransport | None = None,
        download_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._key = SecretStr(api_key.get_secret_value().strip())
        if not _KEY.fullmatch(self._key.get_secret_value()):
            raise ValueError("api_key is empty, or contains a space or a character outside ASCII: copy it again")
        self.base_url = _check_base_url(base_url)
        self._pacer = pacer
        self._gate = gate
        self._timeouts = timeouts = timeouts or Timeouts()
        self._max_bytes = max_bytes
        # A new connection for each paid call: if the service closes a reused one at that moment, it is unknown whether
        # the call was accepted.
        self._transport = transport or open_transport(
            tls=_tls(), keep_alive=False, proxy=find_proxy(httpx.URL(self.base_url))
        )
        self._closed = False
        self._limits = {"timeout": httpx.Timeout(timeouts.connect, read=timeouts.read).as_dict()}
        self._downloader = Downloader(
            endpoint=self.base_url,
            tls=_tls(),
            timeout=httpx.Timeout(timeouts.connect, read=timeouts.download_read),
            deadline=timeouts.download,
            url_settling=timeouts.url_settling,
            url_life=timeouts.url_life,
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            transport=download_transport,
        )

    def __repr__(self) -> str:
        return f"AimlApiClient(base_url={self.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. Later calls raise a RuntimeError."""
        self._closed = True
        try:
            await self._downloader.aclose()
        finally:
            await self._transport.aclose()

    async def generate(
        self,
        request: ImageRequest,
        *,
        client_request_id: str | None = None,
        before_send: Callable[[], Awaitable[None]] | None = None,
        after_refusal: Callable[[], None] | None = None,
        on_answer: Callable[[RawAnswer], Awaitable[None]] | None = None,
    ) -> Generation:
        """Generate images: one POST, which is paid for.

        The POST is repeated only after a rate-limit refusal (429, or 503 with Retry-After: not billed), after the
        delay requested by the service, until `timeouts.pacing` seconds after the first such refusal. Every other
        failure is raised at once. If the caller is cancelled while the call is in flight, it is unknown whether
        the call was billed.

        Args:
            request: the images to generate.
            client_request_id: this package's id of the call in the service's log, 1 to 128 of `A-Za-z0-9._:-`. A new
                one if None.
            before_send: awaited directly before each send of the POST. An exception from it stops the call.
            after_refusal: called directly after each rate-limit refusal, before the delay.
            on_answer: awaited with the body of a success before it is parsed, and before any slot is released.

        Raises:
            NotSent: no connection. Not billed.
            AnswerLost: sent, and no complete response within `timeouts`. Possibly billed.
            InvalidResponse, EmptyGeneration: a response without the images. `billed` has what is known.
            StatusError: a response with an error status, as a subclass for its meaning. `RateLimited`, and
                `ServiceBusy` with `retryable` False, mean that the pacing time-out has passed.
            ValueError: the service would ignore `client_request_id`.
        """
        call_id = f"fp-{uuid4().hex}" if client_request_id is None else client_request_id
        if not _CLIENT_REQUEST_ID.fullmatch(call_id):
            raise ValueError(f"client_request_id {call_id!r} must be 1 to 128 of A-Z a-z 0-9 . _ : -")
        turn = self._pacer.turn(self._timeouts.pacing)
        refusal: StatusError | None = None
        for attempt in itertools.count():
            try:
                async with self._pacer.slot(turn):
                    async with self._gate():
                        if before_send is not None:
                            await before_send()
                        answer = await self._post(request, call_id)
                        raw = RawAnswer.of(answer.body, answer.headers) if answer.succeeded else None
                        if on_answer is not None and raw is not None:
                            await on_answer(raw)
                    refusal = self._parse_error(answer, call_id)
                    if not _is_rate_limit(refusal):
                        if answer.status < 500:  # noqa: PLR2004 - a failure of the service proves no capacity
                            self._pacer.accepted(turn)
                        break
                    if after_refusal is not None:
                        after_refusal()
                    self._pacer.refused(turn, self._pause(refusal, attempt))
            except PacingTimeout:
                raise _pacing_timeout(refusal, call_id, time.monotonic() - turn.requested_at, attempt) from None
        if refusal is not None:
            raise refusal
        assert raw is not None  # noqa: S101 - every answer is a refusal or a success
        return read_answer(raw, request=request, endpoint=self.base_url, client_request_id=call_id)

    async def balance(self) -> Balance:
        """Read the account's balance.

        Raises:
            NotSent, AnswerLost, InvalidResponse, StatusError: as for `generate`; never billed.
        """
        try:
            body = await self._get(BALANCE_PATH)
        except NotFound:
            body = await self._get(OLD_BALANCE_PATH)
            credits_left = _read_amount(body, "balance", OLD_BALANCE_PATH)
            return Balance(credits=credits_left, usd=credits_left / CREDITS_PER_USD)
        usd = _read_amount(body, "current_balance", BALANCE_PATH)
        if body.get("currency", "USD") != "USD":
            raise InvalidResponse(
                f"{BALANCE_PATH} gives the balance in {str(body['currency'])[:20]!r} instead of USD.",
                billed=Billed.NO,
            )
        return Balance(credits=usd * CREDITS_PER_USD, usd=usd)

    async def price(self, model: str) -> float | None:
        """Read the service's own price of one image of a model, in credits. None if it names none.

        Raises:
            NotSent, AnswerLost, InvalidResponse, StatusError: as for `generate`; never billed.
        """
        query = httpx.QueryParams(id=model, include="pricing")
        return parse_price(await self._get(f"{MODELS_PATH}?{query}", most=_LOG_PAGE), model)

    async def deprecations(self) -> dict[str, Deprecation]:
        """Read which models are deprecated, superseded or withdrawn, by model.

        Raises:
            NotSent, AnswerLost, InvalidResponse, StatusError: as for `generate`; never billed.
        """
        return parse_deprecations(await self._get(DEPRECATIONS_PATH, most=_LOG_PAGE))

    async def log_pages(self, start: datetime, end: datetime) -> AsyncIterator[list[LogEntry]]:
        """Read the service's log of the requests made with this API key, newest first, a page at a time.

        Each row is yielded once, even if the log grows meanwhile: `offset` then repeats rows and never skips one.
        Iteration ends with a page that is not full or has no new row. The caller limits the number of pages: each is
        one request, and the service allows 200 a minute for the account.

        A request may be logged some time after its response, so a missing row proves nothing.

        Args:
            start: start of the period, with a time zone.
            end: end of the period, with a time zone; at most 92 days after `start`.

        Raises:
            NotSent, AnswerLost, InvalidResponse, StatusError: as for `generate`; never billed. A 429 is raised at once.
        """
        window = httpx.QueryParams(start=_format_time(start), end=_format_time(end), limit=LOG_PAGE_ROWS)
        seen: set[str | LogEntry] = set()
        for offset in itertools.count(0, LOG_PAGE_ROWS):
            page = parse_log(await self._get(f"{LOGS_PATH}?{window.set('offset', offset)}", most=_LOG_PAGE))
            fresh = []
            for entry in page:
                key = entry.inference_id or entry
                if key not in seen:
                    seen.add(key)
                    fresh.append(entry)
            if fresh:
                yield fresh
            if not fresh or len(page) < LOG_PAGE_ROWS:
                return

    async def download(
        self,
        url: str,
        destination: Path,
        *,
        expected: OutputFormat | None,
        shape: ExpectedShape | None = None,
        delivered_at: datetime | None = None,
    ) -> DownloadedImage:
        """Download one image to `destination`: the bytes as delivered, complete, verified and flushed to disk.

        Streams to a temporary file beside it (`….part`), decodes the complete image, then moves it into place
        atomically: `destination` is never a partial file, even if several downloads write to it at the same time. An
        inline image (`data:`) is processed the same way. The API key is not sent.

        No content encoding is accepted, so `max_bytes` holds for what is received and for what is stored.

        A complete image in another format is kept as `<destination>.rejected`. So is a broken image, or one of another
        shape, that comes twice with the same bytes, or inline; after the first time it is kept as
        `<destination>.suspect`. After any other failure no file remains.

        Args:
            url: from `GeneratedImage.url`.
            destination: the file to write. Its folder is created if it is missing.
            expected: the requested format; None for any.
            shape: the requested shape; None for any.
            delivered_at: when the service delivered the URL; None for one of unknown age.

        Raises:
            ImageGone: the URL is dead: 404 or 410 after its first seconds, or refused after its usual life.
            DownloadRefused: refused although the URL is young, by a proxy, a firewall or a region.
            DownloadEncoded: it has a Content-Encoding, and was not read.
            DownloadInterrupted: cut off, stalled, over `timeouts.download` in total, or temporarily refused.
            NotAnImage: the bytes are not an image.
            BrokenImage: they are not a complete one. Not retryable once they have come twice.
            UnexpectedFormat: a complete image in another format.
            UnexpectedSize: a complete image in another shape. Not retryable once it has come twice.
            ImageTooLarge: over `max_bytes` or `max_pixels`.
            UnsafeURL: neither https nor, if base_url is http, http; or in a private network while base_url is not.
                Redirects are followed at most 5 times, each with the same checks.
            DownloadError: another refusal, or the disk could not be written.
        """
        self._check_open()
        return await self._downloader.download(
            url, destination, expected=expected, shape=shape, delivered_at=delivered_at
        )

    async def _post(self, request: ImageRequest, call_id: str) -> _Answer:
        with self._typed_errors(call_id, self._timeouts.generation):
            with anyio.fail_after(self._timeouts.generation):
                return await self._send(
                    "POST",
                    GENERATIONS_PATH,
                    most=request.num_images * self._max_bytes * 4 // 3 + _ENVELOPE,  # inline they are base64
                    payload=request.payload(),
                    call_id=call_id,
                )

    async def _get(self, path: str, *, most: int = _ENVELOPE) -> Any:
        with self._typed_errors(None, _ENQUIRY_SECONDS):
            with anyio.fail_after(_ENQUIRY_SECONDS):
                answer = await self._send("GET", path, most=most)
        refusal = self._parse_error(answer, None)
        if refusal is not None:
            raise refusal
        return read_json(answer.body)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        most: int,
        payload: dict[str, Any] | None = None,
        call_id: str | None = None,
    ) -> _Answer:
        self._check_open()
        headers = {**_HEADERS, "Authorization": f"Bearer {self._key.get_secret_value()}"}
        if call_id is not None:
            headers["X-Client-Request-Id"] = call_id
        request = httpx.Request(
            method, f"{self.base_url}{path}", json=payload, headers=headers, extensions=self._limits
        )
        async with send(self._transport, request) as response:
            if not response.is_success:
                return _Answer(response.status_code, response.headers, await _read_error_body(response))
            body = await receive(response, most)
            if len(body) > most:
                raise InvalidResponse(
                    f"The service's response is over {most:,} bytes, more than its images can have "
                    "(max_bytes of the client).",
                    client_request_id=call_id,
                    billed=_if_lost(call_id),
                    retryable=False,
                )
            unpacked = unpack(body, response.headers, most)
            # What can't be unpacked is not lost: it is kept as it came, as an answer that can't be parsed.
            return _Answer(response.status_code, response.headers, unpacked.content if unpacked.is_whole else body)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("This client is closed: open a new one.")

    @contextmanager
    def _typed_errors(self, call_id: str | None, seconds: float) -> Iterator[None]:
        """Translate the HTTP library's exceptions into the error tree."""
        try:
            yield
        except _NEVER_SENT as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise NotSent(
                    f"The certificate of {self.base_url} is not trusted ({_reason(error)}): nothing was sent. If it "
                    "is of a private authority, set SSL_CERT_FILE to the file of that authority's certificate.",
                    client_request_id=call_id,
                    retryable=False,
                ) from error
            raise NotSent(
                f"No connection to {self.base_url} ({_reason(error)}): nothing was sent. "
                "Check base_url and the network.",
                client_request_id=call_id,
            ) from error
        except (httpx.RequestError, TimeoutError) as error:
            reason = f"not over after {seconds:g} s" if isinstance(error, TimeoutError) else _reason(error)
            advice = f" It may have been paid: look for {call_id} in the service's log." if call_id else ""
            raise AnswerLost(
                f"The request to {self.base_url} was sent, and no whole answer came back ({reason}).{advice}",
                client_request_id=call_id,
                billed=_if_lost(call_id),
            ) from error

    def _parse_error(self, answer: _Answer, call_id: str | None) -> StatusError | None:
        if answer.succeeded:
            return None
        return parse_error_response(
            status=answer.status,
            headers=answer.headers,
            body=answer.body,
            client_request_id=call_id,
            now=datetime.now(timezone.utc),
            redact=lambda text: text.replace(self._key.get_secret_value(), "[api_key]"),
        )

    def _pause(self, refusal: StatusError, attempt: int) -> float:
        if refusal.retry_after is not None:
            # Capped, so that an absurd header does not stop the process for a day.
            return min(refusal.retry_after, self._timeouts.pacing)
        return backoff(attempt, _FIRST_PAUSE, _LONGEST_PAUSE, random.random)  # noqa: S311 - spreads waits, guards nothing


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def succeeded(self) -> bool:
        return 200 <= self.status < 300  # noqa: PLR2004 - HTTP


@functools.cache
def _tls() -> ssl.SSLContext:
    # Reading the system's certificates takes about ten milliseconds: once per process, not per client.
    context = httpx.create_ssl_context()  # obeys SSL_CERT_FILE and SSL_CERT_DIR
    context.load_default_certs()
    if bundle := os.environ.get("REQUESTS_CA_BUNDLE"):
        try:
            context.load_verify_locations(**{"capath" if Path(bundle).is_dir() else "cafile": bundle})
        except OSError as error:  # also the type for a file without certificates
            raise InvalidSettings(f"REQUESTS_CA_BUNDLE={bundle} can't be used: {error}.") from error
    return context


def _check_base_url(base_url: str) -> str:
    root = normalize_endpoint(base_url)
    url = httpx.URL(root)
    if url.scheme not in {"http", "https"} or not url.host or url.userinfo or url.query or url.fragment:
        raise ValueError(
            "base_url must be only the root URL of the service, such as https://api.aimlapi.com: "
            "http or https, a host, no user, no query"
        )
    return root


def _if_lost(call_id: str | None) -> Billed:
    """Whether a call without a response was billed. Only paid calls have an id."""
    return Billed.NO if call_id is None else Billed.UNKNOWN


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


async def _read_error_body(response: httpx.Response) -> bytes:
    """Read the start of an error's body. A failure to read it is ignored, as the status is known."""
    body = bytearray()
    with suppress(httpx.RequestError), anyio.move_on_after(_REFUSAL_SECONDS):
        await receive(response, _REFUSAL, body)
    return unpack(bytes(body[:_REFUSAL]), response.headers, _REFUSAL).content


def _format_time(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


def _read_amount(body: Any, name: str, path: str) -> float:
    amount = body.get(name) if isinstance(body, dict) else None
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not math.isfinite(amount):
        raise InvalidResponse(f"{path} answered without a number in {name}.", billed=Billed.NO)
    return float(amount)


def _is_rate_limit(refusal: StatusError | None) -> TypeGuard[StatusError]:
    if isinstance(refusal, ServiceBusy):
        return refusal.retry_after is not None
    return isinstance(refusal, RateLimited)


def _pacing_timeout(refusal: StatusError | None, call_id: str, waited: float, tries: int) -> StatusError:
    if refusal is None:
        return RateLimited(
            f"Not sent: the service has refused the other calls of this process for the {waited:.0f} s that this one "
            "waited. Lower max_in_flight, raise the pacing time-out, or run later.",
            status=429,
            client_request_id=call_id,
        )
    return type(refusal)(
        f"{refusal.message} It was refused {tries} times in {waited:.0f} s"
        f"{_requested_delay(refusal.retry_after)}; the pacing time-out limits how long to retry.",
        status=refusal.status,
        request_id=refusal.request_id,
        client_request_id=call_id,
        retry_after=refusal.retry_after,
        retryable=False,
    )


def _requested_delay(retry_after: float | None) -> str:
    return "" if retry_after is None else f", and the service requests a delay of {retry_after:.0f} s"
