"""Sources of prompt tables: a local file, an object in S3, or a web address."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

import anyio
import httpx

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import BucketError, TableError
from flux_prefect.tables.file_views import open_view

__all__ = ["MAX_SOURCE_BYTES", "Source", "local_source", "open_source"]

MAX_SOURCE_BYTES = 512 * 1024 * 1024
"""The largest table that is fetched, in bytes: more than 100,000 of the longest prompts."""

Format = Literal["csv", "jsonl", "parquet"]

_FORMATS: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_SECONDS = 600.0
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_MAX_REDIRECTS = 5
_GONE = {404, 410}
_NO_ACCESS = {401, 403, 407}


@dataclass(frozen=True)
class Source:
    """A table's bytes on this machine. They can be read any number of times.

    Attributes:
        name: the table's name in messages: its path or address, without the query of a signed address.
        format: the file format.
        open_file: opens a reader at the start of the table.
    """

    name: str
    format: Format
    open_file: Callable[[], BinaryIO]

    def open(self) -> BinaryIO:
        """Open a reader of the whole table.

        Raises:
            TableError: the file is missing or can't be read.
        """
        try:
            return self.open_file()
        except OSError as error:
            raise TableError(f"source {self.name!r} can't be read: {error.strerror}.") from error


def local_source(path: str | Path) -> Source:
    """Make a source from a file on this machine, in the format of its suffix. The file is not opened yet.

    Raises:
        TableError: the suffix is unknown, or the path is an address that must be fetched first.
    """
    name = str(path)
    if "://" in name:
        raise TableError(f"source {_redact(name)!r} is an address: use open_table or open_source to fetch it.")
    return Source(name, _format_of(name), lambda: Path(path).open("rb"))


@asynccontextmanager
async def open_source(
    source: str | Path,
    *,
    bucket: ImageBucket | None = None,
    max_bytes: int = MAX_SOURCE_BYTES,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[Source]:
    """Make a table available on this machine while the block runs: a remote table is fetched once.

    A fetched table is streamed into an unnamed temporary file, which disappears with the block or the process, however
    it ends. The disk holds the whole table, memory only a piece of it.

    Args:
        source: a path, `s3://bucket/key`, or an `https://` address (`http://` only for servers on this machine).
        bucket: its keys and endpoint are used for a source in the same bucket; other buckets use boto3's own chain.
        max_bytes: the largest table that is fetched.
        transport: replaces the network in tests.

    Raises:
        TableError: the source can't be read. The message names the source, the problem and the remedy.
    """
    name = str(source)
    scheme, separator, rest = name.partition("://")
    if not separator:
        yield local_source(source)
        return
    public = _redact(name)
    with tempfile.TemporaryFile(buffering=0) as file:
        fetched = _FetchedFile(file, public, max_bytes)
        match scheme.lower():
            case "s3":
                form = _format_of(public)
                await _fetch_object(rest, fetched, bucket)
            case "https" | "http":
                form = _format_of(public)
                await _fetch_url(name, fetched, transport)
            case _:
                raise TableError(
                    f"source {public!r} has the scheme {scheme}: use a path, an s3:// or an https:// address."
                )
        yield Source(public, form, lambda: open_view(file, fetched.size))


class _FetchedFile:
    """The file that a table is fetched into, with a maximum size."""

    def __init__(self, file: BinaryIO, name: str, max_bytes: int) -> None:
        self.name = name
        self.size = 0
        self._file = file
        self._max_bytes = max_bytes

    def expect(self, size: int) -> None:
        """Reject a size over the maximum before the bytes arrive."""
        if size > self._max_bytes:
            raise TableError(
                f"source {self.name!r} is larger than {self._max_bytes:,} bytes, the maximum for a fetched table: "
                "split it, or copy it to this machine and use its path."
            )

    def write(self, content: bytes) -> None:
        self.expect(self.size + len(content))
        try:
            rest = memoryview(content)
            while rest:  # on a full disk one write is partial, and the next one fails
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise TableError(
                f"source {self.name!r} does not fit into the temporary folder ({error.strerror}): "
                "free space, or set TMPDIR to another folder."
            ) from error
        self.size += len(content)

    def receive(self, size: int, pieces: Iterator[bytes]) -> None:
        self.expect(size)
        for piece in pieces:
            self.write(piece)


async def _fetch_object(address: str, fetched: _FetchedFile, bucket: ImageBucket | None) -> None:
    name, _, key = address.partition("/")
    if not name or not key:
        raise TableError(f"source {fetched.name!r} is not the address of an object: write it as s3://bucket/key.")
    try:
        if bucket is not None and bucket.bucket_name == name:
            origin = bucket.model_copy(update={"prefix": ""})
        else:
            origin = ImageBucket(bucket_name=name)
        await origin.stream_path(key, fetched.receive)
    except TableError:
        raise
    except BucketError as error:
        raise TableError(f"source {fetched.name!r} can't be read: {error.message}") from error
    except ValueError as error:
        raise TableError(f"source {fetched.name!r} can't be read: check bucket and key. {error}") from error


async def _fetch_url(url: str, fetched: _FetchedFile, transport: httpx.AsyncBaseTransport | None) -> None:
    name = fetched.name

    async def check_request(request: httpx.Request) -> None:
        # Runs for redirects as well. Plain http could be read and changed in transit.
        plain_allowed = _is_loopback(httpx.URL(url).host) and _is_loopback(request.url.host)
        if request.url.scheme == "http" and not plain_allowed:
            raise TableError(f"source {name!r} leads to http://{request.url.host}: only https is fetched.")

    try:
        with anyio.fail_after(_SECONDS):
            async with (
                httpx.AsyncClient(
                    timeout=_TIMEOUT,
                    follow_redirects=True,
                    max_redirects=_MAX_REDIRECTS,
                    event_hooks={"request": [check_request]},
                    transport=transport,
                ) as client,
                client.stream("GET", url) as response,
            ):
                _check_response(response, name)
                fetched.expect(int(response.headers.get("Content-Length", 0)))
                async for piece in response.aiter_bytes():
                    fetched.write(piece)
    except (httpx.TimeoutException, TimeoutError) as error:
        raise TableError(
            f"source {name!r} timed out: try again, or copy it to this machine and use its path."
        ) from error
    except httpx.TooManyRedirects as error:
        raise TableError(
            f"source {name!r} redirects more than {_MAX_REDIRECTS} times: use its final address."
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TableError(f"source {name!r} can't be fetched ({error}): check the address and the network.") from error


def _check_response(response: httpx.Response, name: str) -> None:
    status = response.status_code
    if status in _GONE:
        raise TableError(f"source {name!r} does not exist (HTTP {status}): check the address.")
    if status in _NO_ACCESS:
        raise TableError(
            f"access to source {name!r} was denied (HTTP {status}): it needs a login, or its signature has expired. "
            "Sign the address again, or copy the table to this machine and use its path."
        )
    if status != httpx.codes.OK:
        raise TableError(f"source {name!r} returned HTTP {status}: try again later, or check the address.")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise TableError(f"source {name!r} is a web page, not a table: use the address of the file itself.")


def _format_of(name: str) -> Format:
    found = _FORMATS.get(PurePosixPath(name).suffix.lower())
    if found is None:
        raise TableError(f"source {name!r} is neither .csv nor .jsonl nor .parquet: save the table as one of them.")
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _redact(address: str) -> str:
    """An address without its secrets: user, password, and the query of a signed address."""
    scheme, _, rest = address.partition("://")
    if scheme.lower() == "s3":
        return address
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0].partition('#')[0]}"
