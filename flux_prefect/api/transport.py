"""An httpx transport over aiohttp's connections, at a quarter of the CPU time.

The package httpx-aiohttp is similar, but it re-encodes URLs (which can break signed ones), lets some of aiohttp's
errors through, and reports a connection that broke after sending as one that was never made; here that distinction
decides what may have been paid for. Requests go to transports directly, without an `httpx.AsyncClient`, as its cookies,
redirects and logins, which are not used here, would double the cost of a request.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import anyio
import httpx
from aiohttp.abc import AbstractResolver
from multidict import CIMultiDict
from yarl import URL

from flux_prefect.errors import InvalidSettings

__all__ = ["AiohttpTransport", "find_proxy", "open_transport", "send"]

_READ_BUFFER = 256 * 1024  # bytes: an image in two or three pieces
_LONGEST_HEADER = 64 * 1024  # bytes: signed URLs in redirects are long
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def find_proxy(url: httpx.URL) -> str | None:
    """The proxy for a URL according to the environment, or None.

    Raises:
        InvalidSettings: the environment names one that can't be used. The message does not show it, as it may hold a
            password.
    """
    if urllib.request.proxy_bypass(url.host):
        return None
    proxies = urllib.request.getproxies()
    name = url.scheme if proxies.get(url.scheme) else "all"
    proxy = proxies.get(name)
    if not proxy:
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if not _is_usable(proxy):
        raise InvalidSettings(
            f"{name.upper()}_PROXY names no proxy that can be used: write it as http://HOST:PORT, https://HOST:PORT, "
            "socks5://HOST:PORT or socks5h://HOST:PORT, or unset it."
        )
    return proxy


def _is_usable(proxy: str) -> bool:
    try:
        url = httpx.URL(proxy)
    except httpx.InvalidURL:
        return False
    return url.scheme in _PROXY_SCHEMES and bool(url.host)


def open_transport(
    *, tls: ssl.SSLContext, keep_alive: bool, proxy: str | None = None, resolver: AbstractResolver | None = None
) -> httpx.AsyncBaseTransport:
    """Open a transport for one event loop: httpx's own with a proxy, else aiohttp's.

    Args:
        tls: the TLS context.
        keep_alive: whether connections are reused for later requests to the same host.
        proxy: the proxy's URL, or None.
        resolver: resolves every name that is connected to, if there is no proxy.
    """
    if proxy is None:
        return AiohttpTransport(tls=tls, keep_alive=keep_alive, resolver=resolver)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0)
    if not proxy.startswith("socks5"):
        return httpx.AsyncHTTPTransport(verify=tls, limits=limits, proxy=proxy)
    # Either way the proxy resolves names; httpx 0.27 knows the first spelling only.
    return _SocksTransport(verify=tls, limits=limits, proxy=proxy.replace("socks5h://", "socks5://", 1))


@asynccontextmanager
async def send(transport: httpx.AsyncBaseTransport, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """Send a request unchanged, once, and keep its response open inside the block. The body is not read yet.

    No redirect is followed, and no proxy or login from the environment is used.

    Raises:
        httpx.TransportError: also inside the block. It does not reference the request, whose headers may be secret.
    """
    try:
        response = await transport.handle_async_request(request)
        try:
            yield response
        finally:
            await response.aclose()
    except httpx.RequestError as error:
        error._request = None  # noqa: SLF001 - some transports set it, and what pickles errors would store the headers
        raise


class AiohttpTransport(httpx.AsyncBaseTransport):
    """A transport for one event loop. Proxies from the environment are not used.

    No POST is ever repeated. The bodies of requests must be in memory. Their connect time-out (including DNS and TLS)
    and read time-out apply.

    Every failure is an `httpx.TransportError`. `ConnectError`, `ConnectTimeout` and `UnsupportedProtocol` mean that
    not a byte was sent.

    Args:
        tls: the TLS context.
        keep_alive: whether connections are reused for later requests to the same host.
        resolver: resolves every name that is connected to. Its exceptions other than OSError are raised unchanged.
    """

    def __init__(self, *, tls: ssl.SSLContext, keep_alive: bool, resolver: AbstractResolver | None = None) -> None:
        self._tls = tls
        self._keep_alive = keep_alive
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request and wait for the head of its response."""
        limits = request.extensions.get("timeout", {})
        headers = CIMultiDict(request.headers.multi_items())
        headers.pop("connection", None)  # aiohttp sets it
        with _as_httpx_errors():
            response = await self._open().request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=headers,
                data=request.content or None,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    connect=limits.get("connect"),
                    sock_connect=limits.get("connect"),
                    sock_read=limits.get("read"),
                ),
            )
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=_Body(response),
            extensions={"reason_phrase": (response.reason or "").encode("ascii", "replace")},
        )

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=self._tls, limit=0, force_close=not self._keep_alive, resolver=self._resolver
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # httpx decompresses
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
                read_bufsize=_READ_BUFFER,
                max_line_size=_LONGEST_HEADER,
                max_field_size=_LONGEST_HEADER,
            )
        return self._session


class _SocksTransport(httpx.AsyncHTTPTransport):
    """httpx's transport through a SOCKS proxy, with an end to the proxy's handshake and a type for its failures.

    httpx waits for the proxy's replies without end, and raises whatever its parser does. Nothing was sent to the
    service by then, which the errors here say: `ProxyError` and `ConnectTimeout`.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request and wait for the head of its response."""
        patience = request.extensions.get("timeout", {}).get("connect") or math.inf
        in_handshake = False

        async def watch(event: str, _: Any) -> None:
            nonlocal in_handshake
            if event.startswith("socks.setup_socks5_connection."):
                in_handshake = not event.endswith(".complete")
                scope.deadline = anyio.current_time() + patience if in_handshake else math.inf

        request.extensions = {**request.extensions, "trace": watch}
        with anyio.CancelScope() as scope:
            try:
                return await super().handle_async_request(request)
            except Exception as error:
                if in_handshake and not isinstance(error, httpx.ProxyError):
                    raise httpx.ProxyError(f"the SOCKS proxy broke off its handshake ({_named(error)})") from error
                raise
        raise httpx.ConnectTimeout("the SOCKS proxy did not answer")


class _Body(httpx.AsyncByteStream):
    """The body of a response, in chunks as they arrive."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx_errors():
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


@contextmanager
def _as_httpx_errors() -> Iterator[None]:
    failure: httpx.TransportError | None = None
    try:
        yield
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        failure = _kind(error)(_reason(error))
    if failure is not None:
        raise failure  # without aiohttp's error as its cause, which may hold the request's headers with the key


def _kind(error: Exception) -> type[httpx.TransportError]:
    kinds: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (  # the first match counts
        (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
        (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
        (aiohttp.ClientConnectorError, httpx.ConnectError),
        (asyncio.TimeoutError, httpx.ReadTimeout),
        (OSError, httpx.ReadError),
    )
    return next((ours for theirs, ours in kinds if isinstance(error, theirs)), httpx.RemoteProtocolError)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _reason(error: Exception) -> str:
    # Messages of aiohttp that contain the URL, which may be a signed one, are left out.
    if isinstance(error, aiohttp.ClientResponseError):
        return error.message
    return "" if isinstance(error, (aiohttp.InvalidURL, aiohttp.ConnectionTimeoutError)) else str(error)
