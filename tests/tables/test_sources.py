"""Sources of tables: real files, a real S3 server, real HTTP over loopback."""

from __future__ import annotations

import gzip
import resource
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import TableError
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tables.sources import MAX_SOURCE_BYTES, Source, local_source, open_source
from flux_prefect.tables.table import open_table

TABLE = b"prompt\na\nb\n"
SIGNED = "https://user:pass-word@files.example/prompts.csv?X-Amz-Signature=5ecret"


class _Site(BaseHTTPRequestHandler):
    """A small web site with tables and every kind of failure."""

    def do_GET(self) -> None:
        """Answer by path."""
        path = self.path.partition("?")[0]
        match path.strip("/").split("/")[0]:
            case "status":
                self._answer(b"", status=int(path.split("/")[2]))
            case "moved":
                self._answer(b"", {"Location": "/prompts.csv"}, status=302)
            case "round":
                self._answer(b"", {"Location": self.path}, status=302)
            case "page":
                self._answer(b"<!doctype html>", {"Content-Type": "text/html; charset=utf-8"})
            case "cut":
                self._answer(TABLE, {"Content-Length": "1000"})
            case "prompts.csv.gz":
                self._answer(gzip.compress(TABLE), {"Content-Encoding": "gzip"})
            case "packed":
                self._answer(gzip.compress(b"prompt\n" + b"a" * 100_000), {"Content-Encoding": "gzip"})
            case _:
                self._answer(TABLE)

    def _answer(self, content: bytes, headers: dict[str, str] | None = None, *, status: int = 200) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Log nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The site's root."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _read(source: Source) -> bytes:
    with source.open() as file:
        return file.read()


async def _fetch(
    address: str,
    *,
    bucket: ImageBucket | None = None,
    max_bytes: int = MAX_SOURCE_BYTES,
    transport: httpx.AsyncBaseTransport | None = None,
) -> bytes:
    async with open_source(address, bucket=bucket, max_bytes=max_bytes, transport=transport) as source:
        return _read(source)


class TestFiles:
    """Files on this machine."""

    @pytest.mark.parametrize(
        ("name", "form"),
        [("a.csv", "csv"), ("a.JSONL", "jsonl"), ("a.ndjson", "jsonl"), ("a.b.parquet", "parquet")],
    )
    async def test_the_suffix_selects_the_format(self, tmp_path: Path, name: str, form: str) -> None:
        """In upper or lower case; the file is read in place."""
        (tmp_path / name).write_bytes(TABLE)
        async with open_source(tmp_path / name) as source:
            assert (source.format, source.name) == (form, str(tmp_path / name))
            assert _read(source) == _read(source) == TABLE

    async def test_a_missing_file_is_named(self) -> None:
        """The error names the file and the reason."""
        with pytest.raises(TableError, match=r"source '/nowhere/a\.csv' can't be read: No such file"):
            _read(local_source("/nowhere/a.csv"))

    @pytest.mark.parametrize("address", ["ftp://host/a.csv", "gs://team/a.csv", "file:///tmp/a.csv"])
    async def test_other_schemes_are_refused(self, address: str) -> None:
        """The error names those that can be read."""
        with pytest.raises(TableError, match="use a path, an s3:// or an https:// address"):
            await _fetch(address)

    @pytest.mark.parametrize(
        "address", ["s3://team/a.xlsx", "https://host/a.xlsx", "https://host/a.xlsx?name=b.csv", "a.txt"]
    )
    async def test_an_address_needs_a_suffix(self, address: str) -> None:
        """It is refused before anything is sent; a query is not part of the name."""
        with pytest.raises(TableError, match=r"neither \.csv nor \.jsonl nor \.parquet"):
            await _fetch(address)


class TestS3:
    """Objects in a bucket."""

    @pytest.mark.parametrize("key", ["prompts.csv", "deep/er/a b+c.csv", "odd?#%20é.csv"])
    async def test_an_object_is_fetched(self, sandbox: RunningSandbox, bucket: ImageBucket, key: str) -> None:
        """Through boto3's own chain of credentials; a key is used exactly as written."""
        assert sandbox.environment["AWS_ENDPOINT_URL_S3"]
        await bucket.write_path(key, TABLE)
        assert await _fetch(f"{bucket.uri}/{key}") == TABLE
        assert await _fetch(f"S3://{bucket.bucket_name}/{bucket.prefix}/{key}") == TABLE

    async def test_the_blocks_keys_open_its_own_bucket(
        self, bucket: ImageBucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A table in the images' bucket needs no keys in the environment, and may be outside the prefix."""
        await bucket.write_path("prompts.csv", TABLE)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(TableError, match="There are no S3 keys"):
            await _fetch(f"{bucket.uri}/prompts.csv")
        elsewhere = bucket.model_copy(update={"prefix": "elsewhere"})
        assert await _fetch(f"{bucket.uri}/prompts.csv", bucket=elsewhere) == TABLE

    async def test_a_missing_object_is_named(self, bucket: ImageBucket) -> None:
        """The error has its address and what to check."""
        with pytest.raises(TableError, match=f"source '{bucket.uri}/a.csv' can't be read: check bucket and key"):
            await _fetch(f"{bucket.uri}/a.csv", bucket=bucket)

    @pytest.mark.parametrize("address", ["s3://nowhere/a.csv", "s3:///a.csv", "s3://images//a.csv"])
    async def test_an_impossible_address_is_refused(self, sandbox: RunningSandbox, address: str) -> None:
        """A bucket that does not exist, or a key that no table can have."""
        assert sandbox.url
        with pytest.raises(TableError, match=f"source '{address}' (can't be read|is not the address of an object)"):
            await _fetch(address)

    async def test_wrong_keys_are_reported(self, sandbox: RunningSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error has the permissions that they need."""
        assert sandbox.url
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(TableError, match="check the keys, and that they allow"):
            await _fetch("s3://images/a.csv")

    async def test_an_unreachable_server_is_reported(self, bucket: ImageBucket) -> None:
        """The error names the settings to check."""
        lost = ImageBucket(**(bucket.model_dump(include={"bucket_name"}) | {"endpoint_url": "http://127.0.0.1:9"}))
        with pytest.raises(TableError, match=r"can't be reached: .*Check endpoint_url"):
            await _fetch("s3://images/a.csv", bucket=lost)

    async def test_a_large_object_is_refused_before_it_is_fetched(self, bucket: ImageBucket) -> None:
        """The error has the maximum size and the remedy."""
        await bucket.write_path("a.csv", TABLE)
        with pytest.raises(TableError, match=rf"^source '{bucket.uri}/a\.csv' is larger than 10 bytes.*copy it to"):
            await _fetch(f"{bucket.uri}/a.csv", bucket=bucket, max_bytes=10)
        assert await _fetch(f"{bucket.uri}/a.csv", bucket=bucket, max_bytes=len(TABLE)) == TABLE


class TestWeb:
    """Addresses on the web."""

    @pytest.mark.parametrize("path", ["/prompts.csv", "/prompts.csv?signature=abc", "/moved/a.csv"])
    async def test_a_table_is_fetched(self, site: str, path: str) -> None:
        """Redirects are followed."""
        assert await _fetch(site + path) == TABLE

    @pytest.mark.parametrize(
        ("path", "complaint"),
        [
            ("/status/404/a.csv", r"does not exist \(HTTP 404\)"),
            ("/status/410/a.csv", r"does not exist \(HTTP 410\)"),
            ("/status/401/a.csv", r"was denied \(HTTP 401\): .*login"),
            ("/status/403/a.csv", r"was denied \(HTTP 403\): .*Sign the address again"),
            ("/status/500/a.csv", "returned HTTP 500: try again later"),
            ("/status/204/a.csv", "returned HTTP 204"),
            ("/round/a.csv", "redirects more than 5 times"),
            ("/page/a.csv", "is a web page, not a table"),
            ("/cut/a.csv", r"can't be fetched \(.*\): check the address and the network"),
        ],
    )
    async def test_each_failure_has_its_own_message(self, site: str, path: str, complaint: str) -> None:
        """With the address and the remedy."""
        with pytest.raises(TableError, match=complaint) as refusal:
            await _fetch(site + path)
        assert f"source '{site}{path}'" in str(refusal.value)

    async def test_a_refused_connection_is_a_table_error(self) -> None:
        """No server listens on the port."""
        with pytest.raises(TableError, match="can't be fetched"):
            await _fetch("http://127.0.0.1:9/a.csv")

    @pytest.mark.parametrize("address", ["https://[bad/a.csv", "https:///a.csv", "https://host:port/a.csv"])
    async def test_a_malformed_address_is_refused(self, address: str) -> None:
        """With a TableError and no other exception."""
        with pytest.raises(TableError, match="can't be fetched"):
            await _fetch(address)

    @pytest.mark.parametrize("path", ["/prompts.csv", "/packed/a.csv"])
    async def test_a_large_table_is_refused(self, site: str, path: str) -> None:
        """The decompressed size counts: a small response may hold a large table."""
        with pytest.raises(TableError, match="is larger than 8 bytes, the maximum for a fetched table"):
            await _fetch(site + path, max_bytes=8)
        if path.startswith("/packed"):
            with pytest.raises(TableError, match="is larger than 50,000 bytes"):
                await _fetch(site + path, max_bytes=50_000)

    async def test_plain_http_is_only_for_this_machine(self) -> None:
        """Other addresses are refused before anything is sent."""
        with pytest.raises(TableError, match=r"leads to http://example\.com: only https is fetched"):
            await _fetch("http://example.com/a.csv")

    @pytest.mark.parametrize("target", ["http://example.com/a.csv", "http://127.0.0.1/a.csv"])
    async def test_a_redirect_never_leaves_https(self, target: str) -> None:
        """An outside server can't redirect to plain http, on this machine or elsewhere."""
        transport = httpx.MockTransport(lambda _: httpx.Response(302, headers={"Location": target}))
        with pytest.raises(TableError, match=r"leads to http://.*: only https is fetched"):
            await _fetch("https://files.example/a.csv", transport=transport)

    async def test_a_stalled_response_is_reported(self) -> None:
        """As a time-out, with the remedy."""

        def stall(request: httpx.Request) -> httpx.Response:
            raise httpx.ReadTimeout("", request=request)

        with pytest.raises(TableError, match="timed out: try again, or copy it to this machine"):
            await _fetch("https://files.example/a.csv", transport=httpx.MockTransport(stall))

    async def test_secrets_of_an_address_are_not_in_the_error(self) -> None:
        """Neither its password nor its signature; both are sent to the server."""
        seen: list[httpx.Request] = []

        def refuse(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            return httpx.Response(403)

        with pytest.raises(TableError) as refusal:
            await _fetch(SIGNED, transport=httpx.MockTransport(refuse))
        assert "access to source 'https://files.example/prompts.csv' was denied" in str(refusal.value)
        assert seen[0].url.query == b"X-Amz-Signature=5ecret"
        assert "Authorization" in seen[0].headers


class TestFetched:
    """Fetched tables."""

    async def test_it_leaves_no_file(self, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The file never has a name, so nothing is left however the process ends."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        async with open_source(f"{site}/a.csv") as source:
            assert _read(source) == TABLE
            assert list(tmp_path.iterdir()) == []

    async def test_readers_are_independent(self, site: str) -> None:
        """Each has its own position, and can seek back."""
        async with open_source(f"{site}/a.csv") as source, open_source(f"{site}/a.csv") as other:
            with source.open() as first, source.open() as second, other.open() as third:
                assert (first.read(6), second.read(8), third.read()) == (TABLE[:6], TABLE[:8], TABLE)
                assert (first.read(), second.read()) == (TABLE[6:], TABLE[8:])
                assert first.seek(-2, 2) == len(TABLE) - 2
                assert first.read() == TABLE[-2:]

    async def test_a_table_is_fetched_once_and_read_twice(self, bucket: ImageBucket) -> None:
        """The object may be replaced once the block is entered."""
        await bucket.write_path("a.csv", TABLE)
        async with open_table(f"{bucket.uri}/a.csv", bucket=bucket) as table:
            await bucket.write_path("a.csv", b"replaced")
            assert len(list(table.rows())) == len(list(table.rows())) == 2

    async def test_a_full_disk_is_reported(self, site: str) -> None:
        """The error names the setting to change."""
        kept = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, kept[1]))
        try:
            with pytest.raises(TableError, match=r"temporary folder \(.*\): free space, or set TMPDIR"):
                await _fetch(f"{site}/a.csv")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
