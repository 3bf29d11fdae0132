"""Downloads of images from their URLs into verified files."""

from __future__ import annotations

import base64
import binascii
import itertools
import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from ssl import SSLContext
from typing import Literal

import anyio
import httpx
from pydantic import Field

from flux_prefect.api.addresses import AddressRules, CheckedResolver
from flux_prefect.api.images import ExpectedShape, InspectedImage, inspect_image
from flux_prefect.api.models import OutputFormat
from flux_prefect.api.retrying import parse_retry_after
from flux_prefect.api.transport import find_proxy, open_transport, send
from flux_prefect.concurrency import run_in_thread
from flux_prefect.errors import (
    BrokenImage,
    DownloadEncoded,
    DownloadError,
    DownloadInterrupted,
    DownloadRefused,
    ImageGone,
    ImageTooLarge,
    ImageUnwritable,
    NotAnImage,
    UnexpectedFormat,
    UnexpectedSize,
    UnsafeURL,
)
from flux_prefect.local_files import explain_os_error, open_part, part_path

__all__ = ["REJECTED", "SUSPECT", "DownloadedImage", "Downloader"]

REJECTED, SUSPECT = ".rejected", ".suspect"
"""Added to the name of an image that is not what was asked for: for certain, and where it came so once."""

MAX_REDIRECTS = 5

_HEADERS = {"User-Agent": "flux_prefect", "Accept": "image/*", "Accept-Encoding": "identity"}
_MAX_UNWRITTEN = 1024 * 1024  # bytes, the usual size of an image: written in one piece, in the thread that flushes it
_MAX_DOWNLOADS = 8
"""Concurrent downloads. The HTTP library's work per request grows with its open connections; more do not raise the
throughput."""
_ABSENT, _GONE = 404, {404, 410}
_EXPIRED = 403  # of a signed URL; the answer of many a proxy as well
_REFUSED = {401, 403, 407, 451}
_TRANSIENT = {408, 425, 429}
_PAUSES = (0.5, 1.0, 2.0)  # before a URL is asked again, at least; the last repeats


class DownloadedImage(InspectedImage):
    """A downloaded image file, with the bytes as delivered."""

    path: Path = Field(description="The file.")


class Downloader:
    """Downloads images into files. Holds no API key, so no key can reach the host of an image.

    Args:
        endpoint: the root URL of the service, which decides the allowed addresses.
        tls: the TLS context.
        timeout: for one connect, and for one read.
        deadline: seconds for one image in total.
        max_bytes: the most bytes of one image.
        max_pixels: the most pixels of one image.
        url_settling: seconds after its delivery in which a URL that answers 404 is asked again.
        url_life: seconds after its delivery in which a URL that is refused is not dead.
        transport: takes the place of the network in tests.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each one a setting
        self,
        *,
        endpoint: str,
        tls: SSLContext,
        timeout: httpx.Timeout,
        deadline: float,
        max_bytes: int,
        max_pixels: int,
        url_settling: float = 10.0,
        url_life: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._rules = AddressRules(endpoint)
        self._tls = tls
        self._limits = {"timeout": timeout.as_dict()}
        self._deadline = deadline
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._url_settling = url_settling
        self._url_life = url_life
        self._turns = anyio.Semaphore(_MAX_DOWNLOADS)
        self._transport = transport
        self._transports: dict[str | None, httpx.AsyncBaseTransport] = {}
        self._proxies: dict[tuple[str, str], str | None] = {}

    async def aclose(self) -> None:
        """Close all connections."""
        while self._transports:
            _, transport = self._transports.popitem()
            await transport.aclose()

    async def download(
        self,
        url: str,
        destination: Path,
        *,
        expected: OutputFormat | None,
        shape: ExpectedShape | None = None,
        delivered_at: datetime | None = None,
    ) -> DownloadedImage:
        """Download one image to `destination`: complete, verified, flushed to disk, and moved into place atomically.

        A host that is busy and requests a delay (Retry-After) is asked again after it, if that is before the deadline.
        See `AimlApiClient.download`.
        """
        inline = url[:5].lower() == "data:"
        part = _PartFile(destination)
        try:
            if inline:
                part.write(self._decode(url))
            else:
                async with self._turns:
                    await self._fetch(url, part, delivered_at)
            image = await run_in_thread(self._verify, part, expected, shape, "answer" if inline else "host")
        except NotAnImage as error:
            if inline:
                error.retryable = False  # the same bytes would be decoded again
            raise
        finally:
            part.discard()
        return image

    def _verify(
        self,
        part: _PartFile,
        expected: OutputFormat | None,
        shape: ExpectedShape | None,
        origin: Literal["answer", "host"],
    ) -> DownloadedImage:
        part.flush()
        try:
            image = inspect_image(part.path, expected, max_pixels=self._max_pixels, shape=shape)
        except UnexpectedFormat as error:
            raise self._reject(part, error, "") from error
        except (BrokenImage, UnexpectedSize) as error:
            if origin == "answer":
                raise self._reject(part, error, "It is inside the service's answer. ") from error
            if part.has_the_bytes_of(SUSPECT):
                twice = "It came twice with the same bytes, so it is what the service delivers. "
                raise self._reject(part, error, twice) from error
            kept = part.publish(SUSPECT)
            raise type(error)(
                f"{error.message} It is kept as {kept} until it is downloaded again. The same bytes again would be "
                "what the service delivers."
            ) from error
        path = part.publish()
        part.drop(SUSPECT)
        return DownloadedImage(**image.model_dump(), path=path)

    def _reject(self, part: _PartFile, error: DownloadError, reason: str) -> DownloadError:
        kept = part.publish(REJECTED)
        part.drop(SUSPECT)
        return type(error)(
            f"{error.message} {reason}It was paid for, so it is kept as {kept}; it is not published.", retryable=False
        )

    def _decode(self, url: str) -> bytes:
        head, _, content = url[5:].partition(",")
        if len(content) > self._max_bytes * 4:  # percent-encoding takes 3 characters a byte, base64 1.4
            raise self._too_large(f"{len(content):,} characters inline")
        raw = urllib.parse.unquote_to_bytes(content)
        try:
            data = base64.b64decode(b"".join(raw.split()), validate=True) if _is_base64(head) else raw
        except binascii.Error as error:
            raise NotAnImage(f"The image delivered inline can't be decoded ({error}).", retryable=False) from error
        if len(data) > self._max_bytes:
            raise self._too_large(f"{len(data):,} bytes")
        return data

    async def _fetch(self, url: str, part: _PartFile, delivered_at: datetime | None) -> None:
        place = "the image's host"
        try:
            target = httpx.URL(url)
            place = target.host or place
            with anyio.fail_after(self._deadline):
                for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
                    try:
                        await self._follow(target, part, delivered_at)
                    except _NotThereYet:
                        await anyio.sleep(pause)
                    except DownloadInterrupted as error:
                        if not _is_in_time(error.retry_after):
                            raise
                        await anyio.sleep(max(pause, error.retry_after or 0))
                    else:
                        return
        except httpx.InvalidURL as error:
            raise UnsafeURL(f"The image's URL is not valid: {error}.") from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise DownloadInterrupted(
                f"The download from {place} was cut off after {part.size:,} bytes ({reason})."
            ) from error
        except TimeoutError as error:
            raise DownloadInterrupted(
                f"The download from {place} was not complete after {self._deadline:g} s ({part.size:,} bytes "
                "received): repeat it, or raise the download time-out."
            ) from error

    async def _follow(self, url: httpx.URL, part: _PartFile, delivered_at: datetime | None) -> None:
        for _ in range(1 + MAX_REDIRECTS):
            proxy = self._proxy_for(url)
            await self._rules.check_url(url, proxied=proxy is not None)
            request = httpx.Request("GET", url, headers=_HEADERS, extensions=self._limits)
            async with send(self._transport_by(proxy), request) as response:
                if not response.has_redirect_location:
                    self._check_status(response, url.host, delivered_at)
                    await self._receive(response, part, url.host)
                    return
                url = url.join(response.headers["location"])
        raise UnsafeURL(f"The image's URL redirects more than {MAX_REDIRECTS} times, last to {url.host}.")

    def _check_status(self, response: httpx.Response, host: str, delivered_at: datetime | None) -> None:
        status = response.status_code
        if response.is_success:
            return
        age = float("inf") if delivered_at is None else (datetime.now(timezone.utc) - delivered_at).total_seconds()
        if status == _ABSENT and age < self._url_settling:
            raise _NotThereYet
        if status in _GONE or (status == _EXPIRED and age >= self._url_life):
            raise ImageGone(
                f"The image's URL is dead: {host} answered {status}. Run again: a flow that heals pays for it anew, "
                "once, with the same seed; in a flow of your own, generate with refresh_cache=True."
            )
        if status in _TRANSIENT or response.is_server_error:
            raise DownloadInterrupted(
                f"{host} answered {status} instead of the image.",
                retry_after=parse_retry_after(response.headers.get("retry-after"), datetime.now(timezone.utc)),
            )
        if status in _REFUSED:
            raise DownloadRefused(
                f"{host} answered {status}, which is not how the URL of a young image dies: a proxy, a firewall or a "
                "region refuses it. Let this host fetch from there, then run again: the image is paid for and is "
                "fetched from the same URL while that lives."
            )
        raise DownloadError(f"{host} answered {status} instead of the image, and would do so again.")

    async def _receive(self, response: httpx.Response, part: _PartFile, host: str) -> None:
        encoding = response.headers.get("content-encoding", "")
        if encoding.strip().lower() not in {"", "identity"}:
            raise DownloadEncoded(
                f"{host} sent the image with the Content-Encoding {encoding[:60]!r} although none is accepted, so it "
                "was not read: a proxy on the way compresses it. Let it pass images unchanged, then run again: the "
                "image is paid for and is fetched from the same URL while that lives."
            )
        announced = response.headers.get("content-length", "")
        length = int(announced) if announced.isascii() and announced.isdigit() else None
        if length is not None and length > self._max_bytes:
            raise self._too_large(f"{length:,} bytes")
        async for chunk in response.aiter_bytes():
            if part.size + len(chunk) > self._max_bytes:
                raise self._too_large(f"over {part.size:,} bytes")
            part.write(chunk)
        if length is not None and part.size != length:
            raise DownloadInterrupted(f"The download from {host} was cut off: {part.size:,} bytes of {length:,}.")

    def _too_large(self, size: str) -> ImageTooLarge:
        return ImageTooLarge(
            f"The image delivered has {size}, over the limit of {self._max_bytes:,} bytes (max_bytes of the client)."
        )

    def _proxy_for(self, url: httpx.URL) -> str | None:
        # Read from the environment here, so that it is certain which side resolves a connection's addresses.
        place = url.scheme, url.host
        if place not in self._proxies:
            self._proxies[place] = None if self._transport is not None else find_proxy(url)
        return self._proxies[place]

    def _transport_by(self, proxy: str | None) -> httpx.AsyncBaseTransport:
        if self._transport is not None:
            return self._transport
        if proxy not in self._transports:
            resolver = CheckedResolver(self._rules)
            self._transports[proxy] = open_transport(tls=self._tls, keep_alive=True, proxy=proxy, resolver=resolver)
        return self._transports[proxy]


class _NotThereYet(Exception):
    """A URL so young that a 404 may pass."""


class _PartFile:
    """The temporary file beside the destination that receives bytes until they are verified."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self.path = part_path(destination)
        self.size = 0
        self._unwritten: list[bytes] = []  # a list, as a buffer would be another copy
        self._unwritten_bytes = 0
        with self._disk():
            destination.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_part(self.path, buffering=0)

    def write(self, chunk: bytes) -> None:
        self._unwritten.append(chunk)
        self.size += len(chunk)
        self._unwritten_bytes += len(chunk)
        if self._unwritten_bytes > _MAX_UNWRITTEN:
            self._write_out()

    def flush(self) -> None:
        """Write everything and wait until it is on the disk."""
        self._write_out()
        with self._disk():
            os.fsync(self._file.fileno())

    def publish(self, suffix: str = "") -> Path:
        """Rename the file to its final name, atomically."""
        path = self._named(suffix)
        with self._disk():
            self.path.replace(path)
        return path

    def has_the_bytes_of(self, suffix: str) -> bool:
        """Whether the file that was published with this suffix has the same bytes."""
        try:
            return self._named(suffix).read_bytes() == self.path.read_bytes()
        except OSError:
            return False

    def drop(self, suffix: str) -> None:
        """Remove the file that was published with this suffix, if any."""
        with suppress(OSError):
            self._named(suffix).unlink()

    def discard(self) -> None:
        """Remove the file if it was not published."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self.path.unlink()

    def _named(self, suffix: str) -> Path:
        return self._destination.with_name(f"{self._destination.name}{suffix}")

    def _write_out(self) -> None:
        with self._disk():
            for chunk in self._unwritten:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[self._file.write(rest) :]
        self._unwritten.clear()
        self._unwritten_bytes = 0

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = f"make room in the spool folder {self.path.parent} or make it writable"
            raise ImageUnwritable(
                f"{self.path} could not be written {explain_os_error(error, remedy)}, then run again. "
                "The image is paid for; its URL dies within minutes."
            ) from error


def _is_in_time(delay: float | None) -> bool:
    """Whether a requested delay ends before the enclosing deadline. Without a request there is no delay."""
    return delay is not None and anyio.current_time() + delay < anyio.current_effective_deadline()


def _is_base64(head: str) -> bool:
    return head.rpartition(";")[2].strip().lower() == "base64"
