"""Sources of prompt tables: local files, objects in S3, or a web address, each compressed or not."""

from __future__ import annotations

import glob
import gzip
import importlib
import os
import re
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from email.message import Message
from functools import partial
from ipaddress import ip_address
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import unquote

import anyio
import httpx

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.concurrency import run_in_thread
from flux_prefect.errors import BucketError, TableError
from flux_prefect.tables.file_views import open_view

__all__ = ["MAX_FILES", "MAX_SOURCE_BYTES", "MAX_UNPACKED_BYTES", "Format", "Source", "local_source", "open_source"]

MAX_SOURCE_BYTES = 512 * 1024 * 1024
"""The largest table that is fetched, in bytes: more than 100,000 of the longest prompts."""

MAX_UNPACKED_BYTES = 8 * MAX_SOURCE_BYTES
"""The largest table that is decompressed, in bytes."""

MAX_FILES = 10_000
"""The most files that a folder or pattern may stand for."""

Format = Literal["csv", "tsv", "json", "jsonl", "parquet", "arrow"]

_FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_CONTENT_TYPES: dict[str, Format] = {
    "text/csv": "csv",
    "application/csv": "csv",
    "text/tab-separated-values": "tsv",
    "application/json": "json",
    "application/jsonl": "jsonl",
    "application/x-jsonlines": "jsonl",
    "application/x-ndjson": "jsonl",
    "application/ndjson": "jsonl",
    "application/vnd.apache.parquet": "parquet",
    "application/vnd.apache.arrow.file": "arrow",
    "application/vnd.apache.arrow.stream": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_SIGNATURES = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_PATTERN = re.compile(r"[*?\[]")
_EXPECTED = "neither .csv nor .jsonl nor .parquet (nor .tsv, .json, .arrow; each also with .gz or .zst)"
_REFUSED = {".xlsx", ".xls", ".ods", ".numbers"}  # their content types say no more
_MOST_LISTED_KEYS = 100_000
_PIECE = 1024 * 1024
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
        parts: the files of a folder or pattern, in the order of their names; empty for a single file.
        partition: columns from the names of the file's folders, such as `country=de`.
        is_packed: whether each reader decompresses it anew.
    """

    name: str
    format: Format
    open_file: Callable[[], BinaryIO]
    parts: tuple[Source, ...] = ()
    partition: Mapping[str, str] = field(default_factory=dict)
    is_packed: bool = False

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
    """Make a source from a file, folder or pattern on this machine. Files are not opened yet.

    Raises:
        TableError: the suffix is unknown, no file matches, or the path is an address that must be fetched first.
    """
    name = str(path)
    if "://" in name:
        raise TableError(f"source {_redact(name)!r} is an address: use open_table or open_source to fetch it.")
    place = Path(path)
    root = name
    if name and place.is_dir():
        found = sorted(str(file) for file in place.rglob("*") if _is_table(file.relative_to(place)) and file.is_file())
    elif _PATTERN.search(name) and not place.exists():
        root = _root_of(name)
        found = sorted(file for file in glob.iglob(name, recursive=True) if Path(file).is_file())  # noqa: PTH207 - takes absolute patterns
    else:
        return _make_source(name, *_format_of(name), lambda: Path(path).open("rb"))
    parts = [_make_source(file, *_format_of(file), partial(_open_file, file)) for file in found]
    return _join_parts(name, parts, root)


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
    it ends; so is what a compressed table holds. The disk holds the whole table, memory only a piece of it.

    The suffix is the format: .csv, .tsv, .json, .jsonl (.ndjson), .parquet or .arrow (.feather), each also with .gz or
    .zst. Web addresses without such a suffix have the format of their content type. A folder stands for all tables
    below it, except those with a name that begins with a dot or underscore.

    Args:
        source: a path, `s3://bucket/key`, or an `https://` address (`http://` only for servers on this machine). A
            folder (`prompts/`, `s3://bucket/prompts/`) or a pattern (`prompts/*.parquet`, `s3://bucket/**/*.csv`).
        bucket: its keys and endpoint are used for a source in the same bucket; other buckets use boto3's own chain.
        max_bytes: the largest table that is fetched.
        transport: replaces the network in tests.

    Raises:
        TableError: the source can't be read. The message names the source, the problem and the remedy.
    """
    name = str(source)
    scheme, separator, rest = name.partition("://")
    if not separator:
        with _unpacked(local_source(source)) as local:
            yield local
        return
    public = _redact(name)
    with tempfile.TemporaryFile(buffering=0) as file:
        fetched = _FetchedFile(file, public, max_bytes)
        match scheme.lower():
            case "s3":
                made = await _fetch_from_bucket(rest, fetched, bucket)
            case "https" | "http":
                form = await _fetch_url(name, fetched, transport)
                made = _make_source(public, *form, fetched.end_part())
            case _:
                raise TableError(
                    f"source {public!r} has the scheme {scheme}: use a path, an s3:// or an https:// address."
                )
        with _unpacked(made) as ready:
            yield ready


def _make_source(name: str, form: Format, compression: str | None, open_raw: Callable[[], BinaryIO]) -> Source:
    if compression is None:
        return Source(name, form, open_raw)
    return Source(name, form, lambda: _unpack(open_raw(), compression, name), is_packed=True)


def _join_parts(name: str, parts: list[Source], root: str) -> Source:
    if not parts:
        raise TableError(f"source {name!r} has no tables: check the folder or pattern, and the suffixes of its files.")
    if len(parts) > MAX_FILES:
        raise TableError(f"source {name!r} is more than {MAX_FILES:,} files: join them, or use a narrower pattern.")
    complete = tuple(replace(part, partition=_partition_of(part.name, root)) for part in parts)

    def refuse() -> BinaryIO:
        raise TableError(f"source {name!r} is several files: name one of them.")

    return Source(name, complete[0].format, refuse, complete)


def _root_of(pattern: str) -> str:
    """The folders of a pattern that are the same for all of its files."""
    return _PATTERN.split(pattern)[0].rpartition("/")[0]


def _partition_of(name: str, root: str) -> dict[str, str]:
    """The columns that the folders below the source name; the folders above it are no part of the table."""
    below = PurePosixPath(name).parts[len(PurePosixPath(root).parts) : -1]
    pairs = (folder.partition("=") for folder in below)
    values = {unquote(column): unquote(value) for column, sign, value in pairs if sign and column}
    return {column: "" if value == "__HIVE_DEFAULT_PARTITION__" else value for column, value in values.items()}


def _open_file(name: str) -> BinaryIO:
    return Path(name).open("rb")


def _is_table(path: PurePath) -> bool:
    """Whether a file in a folder is one of its tables: it has a table's suffix, and no hidden name on the way."""
    return _find_format(path.name) is not None and not any(part.startswith((".", "_")) for part in path.parts)


@contextmanager
def _unpacked(source: Source) -> Iterator[Source]:
    """Decompress a single source once for the block instead of once for each reader."""
    if not source.is_packed:
        yield source
        return
    with source.open() as content:
        size = content.seek(0, os.SEEK_END)
        yield replace(source, open_file=lambda: open_view(content, size), is_packed=False)


def _unpack(packed: BinaryIO, compression: str, name: str) -> BinaryIO:
    """Decompress into an unnamed temporary file, in flat memory."""
    content = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - the reader closes it
    try:
        with packed, _open_packed(packed, compression) as pieces:
            size = 0
            while piece := pieces.read(_PIECE):
                size += len(piece)
                if size > MAX_UNPACKED_BYTES:
                    raise TableError(
                        f"source {name!r} holds more than {MAX_UNPACKED_BYTES:,} bytes when decompressed: split it."
                    )
                content.write(piece)
        content.seek(0)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # Arrow's errors are OSErrors and ValueErrors
        content.close()
        if isinstance(error, TableError):
            raise
        raise TableError(f"source {name!r} can't be decompressed as {compression} ({error}): compress it again.") from (
            error
        )
    return content


def _open_packed(packed: BinaryIO, compression: str) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=packed)
    try:
        return importlib.import_module("pyarrow").CompressedInputStream(packed, compression)
    except ImportError as error:
        raise TableError("Tables in .zst need pyarrow: pip install 'flux_prefect[parquet]'.") from error


class _FetchedFile:
    """The file that a table is fetched into, with a maximum size."""

    def __init__(self, file: BinaryIO, name: str, max_bytes: int) -> None:
        self.name = name
        self.size = 0
        self._start = 0
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

    def end_part(self) -> Callable[[], BinaryIO]:
        """Return what opens the bytes that were written since the last part."""
        start, size = self._start, self.size - self._start
        self._start = self.size
        return lambda: open_view(self._file, size, start)

    def receive(self, size: int, pieces: Iterator[bytes]) -> None:
        self.expect(self.size + size)
        for piece in pieces:
            self.write(piece)


async def _fetch_from_bucket(address: str, fetched: _FetchedFile, bucket: ImageBucket | None) -> Source:
    name, _, key = address.partition("/")
    if not name or not key.strip("/"):
        raise TableError(f"source {fetched.name!r} is not the address of an object: write it as s3://bucket/key.")
    is_folder = key.endswith("/") or not PurePosixPath(key).suffix
    if not is_folder and "*" not in key:
        form = _format_of(fetched.name)
        await _fetch_object(name, key, fetched, bucket)
        return _make_source(fetched.name, *form, fetched.end_part())
    keys = await _list_tables(name, key, fetched, bucket, is_folder=is_folder)
    parts = []
    for found in keys:
        form = _format_of(found)
        await _fetch_object(name, found, fetched, bucket)
        parts.append(_make_source(f"s3://{name}/{found}", *form, fetched.end_part()))
    root = fetched.name if is_folder and "*" not in key else _root_of(fetched.name)
    return _join_parts(fetched.name, parts, root)


async def _list_tables(
    name: str, key: str, fetched: _FetchedFile, bucket: ImageBucket | None, *, is_folder: bool
) -> list[str]:
    start = f"{key.rstrip('/')}/" if is_folder and "*" not in key else key.partition("*")[0]
    with _explained(fetched.name):
        found = await run_in_thread(partial(_origin(name, bucket).objects.list_keys, start, most=_MOST_LISTED_KEYS))
    if found is None:
        raise TableError(
            f"source {fetched.name!r}: more than {_MOST_LISTED_KEYS:,} objects begin with {start!r}: use a narrower "
            "folder or pattern."
        )
    if is_folder and "*" not in key:
        return sorted(each for each in found if _is_table(PurePosixPath(each[len(start) :])))
    matches = _compile_pattern(f"{key.rstrip('/')}/**" if key.endswith("/") else key)
    return sorted(each for each in found if matches.fullmatch(each) and _find_format(each) is not None)


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    kinds = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(kinds.get(piece, re.escape(piece)) for piece in pieces), re.DOTALL)


def _origin(name: str, bucket: ImageBucket | None) -> ImageBucket:
    if bucket is not None and bucket.bucket_name == name:
        return bucket.model_copy(update={"prefix": ""})
    return ImageBucket(bucket_name=name)


async def _fetch_object(name: str, key: str, fetched: _FetchedFile, bucket: ImageBucket | None) -> None:
    with _explained(fetched.name):
        await _origin(name, bucket).stream_path(key, fetched.receive)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the errors of a bucket into those of a source."""
    try:
        yield
    except TableError:
        raise
    except BucketError as error:
        raise TableError(f"source {name!r} can't be read: {error.message}") from error
    except ValueError as error:
        raise TableError(f"source {name!r} can't be read: check bucket and key. {error}") from error


async def _fetch_url(
    url: str, fetched: _FetchedFile, transport: httpx.AsyncBaseTransport | None
) -> tuple[Format, str | None]:
    name = fetched.name
    if PurePosixPath(name).suffix.lower() in _REFUSED:
        _format_of(name)

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
                form = _find_format(name.partition("://")[2].partition("/")[2]) or _format_of_response(response, name)
                fetched.expect(int(response.headers.get("Content-Length", 0)))
                start = b""
                async for piece in response.aiter_bytes():
                    start = start or piece[:4]
                    fetched.write(piece)
                return form if _is_still_packed(form[1], start, response) else (form[0], None)
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


def _is_still_packed(compression: str | None, start: bytes, response: httpx.Response) -> bool:
    """Whether a compressed file is what arrived: some hosts serve it with a Content-Encoding, which httpx undoes."""
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    return not encoded or compression is None or start.startswith(_SIGNATURES[compression])


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


def _format_of_response(response: httpx.Response, name: str) -> tuple[Format, str | None]:
    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    saved_as = Message()
    saved_as["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    if form := _find_format(saved_as.get_filename() or ""):
        return form
    if content_type in _CONTENT_TYPES:
        return _CONTENT_TYPES[content_type], None
    raise TableError(
        f"source {name!r} has the content type {content_type or 'none'}, and its address is {_EXPECTED}: use an "
        "address that exports one of them, such as …/export?format=csv."
    )


def _find_format(name: str) -> tuple[Format, str | None] | None:
    path = PurePosixPath(name)
    compression = _COMPRESSIONS.get(path.suffix.lower())
    form = _FORMATS.get((path if compression is None else path.with_suffix("")).suffix.lower())
    return None if form is None else (form, compression)


def _format_of(name: str) -> tuple[Format, str | None]:
    found = _find_format(name)
    if found is None:
        raise TableError(f"source {name!r} is {_EXPECTED}: save the table as one of them.")
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
