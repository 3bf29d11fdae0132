"""Where a table comes from: a file here, an object in S3, or an address on the web."""

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
"""The largest table that is fetched: over 100,000 of the longest prompts."""

Format = Literal["csv", "jsonl", "parquet"]

_FORMATS: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_SECONDS = 600.0
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_MAX_REDIRECTS = 5
_GONE = {404, 410}
_NO_ACCESS = {401, 403, 407}


@dataclass(frozen=True)
class Source:
    """A table's bytes on this machine, to be read any number of times.

    Attributes:
        name: what messages call it: path or address, without the query of a signed address.
        format: how the bytes are to be read.
        open_file: a reader of all of it, from its start.
    """

    name: str
    format: Format
    open_file: Callable[[], BinaryIO]

    def open(self) -> BinaryIO:
        """A reader of the whole table.

        Raises:
            TableError: the file is missing or can't be read.
        """
        try:
            return self.open_file()
        except OSError as error:
            raise TableError(f"source {self.name!r} can't be read: {error.strerror}.") from error


def local_source(path: str | Path) -> Source:
    """A file on this machine, in the format that its suffix says. It is not opened yet.

    Raises:
        TableError: another suffix, or an address that must be fetched first.
    """
    name = str(path)
    if "://" in name:
        raise TableError(f"source {_redact(name)!r} is an address: fetch it with open_table or open_source.")
    return Source(name, _format_of(name), lambda: Path(path).open("rb"))


@asynccontextmanager
async def open_source(
    source: str | Path,
    *,
    bucket: ImageBucket | None = None,
    max_bytes: int = MAX_SOURCE_BYTES,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[Source]:
    """Have a table on this machine, fetched once where it is elsewhere.

    What is fetched goes to a file without a name, so it is gone with the block or the process, however that ends.
    It is streamed: the disk holds all of it, memory a piece.

    Args:
        source: a path, `s3://bucket/key`, or an `https://` address (`http://` for this machine's own servers alone).
        bucket: its keys and endpoint are used for a source in the same bucket. Other buckets: boto3's own chain.
        max_bytes: the largest table that is fetched.
        transport: takes the place of the network in tests.

    Raises:
        TableError: with the source, what is wrong with it and what to do.
    """
    name = str(source)
    scheme, separator, rest = name.partition("://")
    if not separator:
        yield local_source(source)
        return
    public = _redact(name)
    with tempfile.TemporaryFile(buffering=0) as file:
        landing = _FetchedFile(file, public, max_bytes)
        match scheme.lower():
            case "s3":
                form = _format_of(public)
                await _fetch_object(rest, landing, bucket)
            case "https" | "http":
                form = _format_of(public)
                await _fetch_url(name, landing, transport)
            case _:
                raise TableError(
                    f"source {public!r} has the scheme {scheme}: give a path, an s3:// or an https:// address."
                )
        yield Source(public, form, lambda: open_view(file, landing.size))


class _FetchedFile:
    """The file that a table is fetched into, up to a size."""

    def __init__(self, file: BinaryIO, name: str, max_bytes: int) -> None:
        self.name = name
        self.size = 0
        self._file = file
        self._max_bytes = max_bytes

    def expect(self, size: int) -> None:
        """Refuse what would be too large before it comes."""
        if size > self._max_bytes:
            raise TableError(
                f"source {self.name!r} is larger than {self._max_bytes:,} bytes, the most that is fetched: "
                "split it, or copy it here and give its path."
            )

    def write(self, content: bytes) -> None:
        self.expect(self.size + len(content))
        try:
            rest = memoryview(content)
            while rest:  # a disk that fills up takes a part, and says so at the next
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise TableError(
                f"source {self.name!r} does not fit into the temporary folder ({error.strerror}): "
                "make room, or set TMPDIR to a folder that has some."
            ) from error
        self.size += len(content)

    def receive(self, size: int, pieces: Iterator[bytes]) -> None:
        self.expect(size)
        for piece in pieces:
            self.write(piece)


async def _fetch_object(address: str, landing: _FetchedFile, bucket: ImageBucket | None) -> None:
    name, _, key = address.partition("/")
    if not name or not key:
        raise TableError(f"source {landing.name!r} is no object's address: write it as s3://bucket/key.")
    try:
        if bucket is not None and bucket.bucket_name == name:
            origin = bucket.model_copy(update={"prefix": ""})
        else:
            origin = ImageBucket(bucket_name=name)
        await origin.stream_path(key, landing.receive)
    except TableError:
        raise
    except BucketError as error:
        raise TableError(f"source {landing.name!r} can't be read: {error.message}") from error
    except ValueError as error:
        raise TableError(f"source {landing.name!r} can't be read: check bucket and key. {error}") from error


async def _fetch_url(url: str, landing: _FetchedFile, transport: httpx.AsyncBaseTransport | None) -> None:
    name = landing.name

    async def check_hop(request: httpx.Request) -> None:
        # Redirects come through here as well. Plain http could be read and changed on its way.
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
                    event_hooks={"request": [check_hop]},
                    transport=transport,
                ) as client,
                client.stream("GET", url) as response,
            ):
                _check_answer(response, name)
                landing.expect(int(response.headers.get("Content-Length", 0)))
                async for piece in response.aiter_bytes():
                    landing.write(piece)
    except (httpx.TimeoutException, TimeoutError) as error:
        raise TableError(f"source {name!r} timed out: try again, or copy it here and give its path.") from error
    except httpx.TooManyRedirects as error:
        raise TableError(
            f"source {name!r} redirects more than {_MAX_REDIRECTS} times: give its final address."
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TableError(f"source {name!r} can't be fetched ({error}): check the address and the network.") from error


def _check_answer(response: httpx.Response, name: str) -> None:
    status = response.status_code
    if status in _GONE:
        raise TableError(f"source {name!r} does not exist (HTTP {status}): check the address.")
    if status in _NO_ACCESS:
        raise TableError(
            f"source {name!r} may not be read (HTTP {status}): the address needs a login or its signature ran out. "
            "Sign it anew, or copy the table here and give its path."
        )
    if status != httpx.codes.OK:
        raise TableError(f"source {name!r} was answered with HTTP {status}: try again later, or check the address.")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise TableError(f"source {name!r} is a web page, not a table: give the address of the file itself.")


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
    """The address without what may be secret in it: user, password, and the query of a signed address."""
    scheme, _, rest = address.partition("://")
    if scheme.lower() == "s3":
        return address
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0].partition('#')[0]}"
