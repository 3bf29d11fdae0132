from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import socket
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from pydantic import SecretStr

from flux_prefect.api import downloads
from flux_prefect.api.client import AimlApiClient, Timeouts
from flux_prefect.api.images import ExpectedShape
from flux_prefect.api.pacing import Pacer
from flux_prefect.errors import (
    Billed,
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
from flux_prefect.local_files import remove_abandoned

from .raw_server import answer, reset, serve

KEY = "sk-test-5f0c1d7e9a"
PUBLIC = "https://93.184.215.14/one.jpg?signature=secret"  # an address, so that no name is looked up
BOMB = Path(__file__).parents[1] / "data" / "1331_MiB.gz.gz"
HTML = b"<!DOCTYPE html><html>expired</html>"


def make_client(
    handler: Callable[[httpx.Request], httpx.Response] | None = None,
    *,
    base_url: str = "https://93.184.215.13",
    max_bytes: int = 100_000,
    timeouts: Timeouts | None = None,
    library: str = "aiohttp",
) -> AimlApiClient:
    """A client with this handler in place of the images' hosts, or with the real network by one of the libraries."""
    real = httpx.AsyncHTTPTransport() if library == "httpx" else None
    return AimlApiClient(
        api_key=SecretStr(KEY),
        base_url=base_url,
        pacer=Pacer(4),
        timeouts=timeouts,
        max_bytes=max_bytes,
        max_pixels=1_000_000,
        download_transport=real if handler is None else httpx.MockTransport(handler),
    )


def data_uri(data: bytes, content_type: str = "image/jpeg") -> str:
    """The image inline."""
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """A file in a folder that does not exist yet."""
    return tmp_path / "spool" / "image.jpeg"


def left_behind(destination: Path) -> list[str]:
    """The names beside the destination."""
    return sorted(path.name for path in destination.parent.iterdir())


# Success


async def test_an_image_arrives_as_it_was_delivered(jpeg: bytes, destination: Path) -> None:
    """Byte for byte, with its digest and size, and without the key having left the house."""
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, content=jpeg)

    async with make_client(handler) as client:
        image = await client.download(PUBLIC, destination, expected="jpeg")
    assert destination.read_bytes() == jpeg
    assert image.path == destination
    assert image.sha256 == hashlib.sha256(jpeg).hexdigest()
    assert image.size == len(jpeg)
    assert (image.format, image.width, image.height, image.black) == ("jpeg", 96, 64, False)
    assert left_behind(destination) == ["image.jpeg"]
    (request,) = requests
    assert str(request.url) == PUBLIC
    assert KEY not in repr(request.headers.raw)


async def test_several_at_the_same_time_do_not_mix(jpeg: bytes, destination: Path) -> None:
    """Each writes a file of its own, whole; the last one's stays."""
    async with make_client(lambda _: httpx.Response(200, content=jpeg)) as client:
        images = await asyncio.gather(*(client.download(PUBLIC, destination, expected="jpeg") for _ in range(5)))
    assert {image.path for image in images} == {destination}
    assert destination.read_bytes() == jpeg
    assert left_behind(destination) == [destination.name]


@pytest.mark.parametrize("content_type", ["text/html", "application/octet-stream", None])
async def test_the_bytes_count_and_not_their_label(jpeg: bytes, destination: Path, content_type: str | None) -> None:
    """Hosts send wrong content types."""
    headers = {"Content-Type": content_type} if content_type else {}
    async with make_client(lambda _: httpx.Response(200, content=jpeg, headers=headers)) as client:
        assert (await client.download(PUBLIC, destination, expected="jpeg")).content_type == "image/jpeg"


@pytest.mark.parametrize(
    "form",
    [
        "data:image/jpeg;base64,{b64}",
        "DATA:;BASE64,{b64}",
        "data:image/jpeg;charset=x;base64,{quoted}",
        "data:image/jpeg,{percent}",
    ],
)
async def test_an_inline_image_goes_the_same_way(jpeg: bytes, destination: Path, form: str) -> None:
    """Nothing is fetched."""
    b64 = base64.b64encode(jpeg).decode()
    url = form.format(b64=b64, quoted=urllib.parse.quote(b64, safe=""), percent=urllib.parse.quote(jpeg, safe=""))

    def handler(_: httpx.Request) -> httpx.Response:
        pytest.fail("something was fetched")

    async with make_client(handler) as client:
        image = await client.download(url, destination, expected="jpeg")
    assert destination.read_bytes() == jpeg
    assert image.sha256 == hashlib.sha256(jpeg).hexdigest()


@pytest.mark.parametrize("library", ["aiohttp", "httpx"])
@pytest.mark.parametrize("encoding", ["gzip", "identity, GZIP", "gzip, gzip", "br", "x-unknown"])
async def test_a_compressed_image_is_not_read(encoding: str, library: str, destination: Path) -> None:
    """None is accepted, as 2 KB that are packed twice unpack to 1.3 GiB. The image stays paid for and unfetched."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(BOMB.read_bytes(), headers=f"Content-Encoding: {encoding}\r\n"))

    async with serve(handler) as server, make_client(base_url=server.url, library=library) as client:
        with pytest.raises(DownloadEncoded, match=f"Content-Encoding '{encoding}'") as raised:
            await client.download(f"{server.url}/one.jpg", destination, expected="jpeg")
    assert "accept-encoding: identity\r\n" in server.requests[0].lower()
    assert not raised.value.retryable
    assert left_behind(destination) == []


@pytest.mark.parametrize("library", ["aiohttp", "httpx"])
async def test_the_encoding_identity_is_none(library: str, jpeg: bytes, destination: Path) -> None:
    """Some hosts send it."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(jpeg, headers="Content-Encoding: identity\r\n"))

    async with serve(handler) as server, make_client(base_url=server.url, library=library) as client:
        await client.download(f"{server.url}/one.jpg", destination, expected="jpeg")
    assert destination.read_bytes() == jpeg


async def test_redirects_are_followed(jpeg: bytes, destination: Path) -> None:
    """Five of them, also relative ones."""

    def handler(request: httpx.Request) -> httpx.Response:
        step = int(request.url.params.get("step", "0"))
        if step == 5:
            return httpx.Response(200, content=jpeg)
        return httpx.Response(302, headers={"Location": f"/hop?step={step + 1}"})

    async with make_client(handler) as client:
        await client.download(PUBLIC, destination, expected="jpeg")
    assert destination.read_bytes() == jpeg


async def test_a_real_download_over_a_socket(jpeg: bytes, destination: Path) -> None:
    """Plain http and a loopback address are fine where the service itself is there."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(jpeg))

    async with serve(handler) as server, make_client(base_url=server.url) as client:
        await client.download(f"{server.url}/one.jpg", destination, expected="jpeg")
        assert "authorization" not in server.requests[0].lower()
    assert destination.read_bytes() == jpeg


# Refusals and broken downloads


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (403, ImageGone, False),
        (404, ImageGone, False),
        (410, ImageGone, False),
        (408, DownloadInterrupted, True),
        (429, DownloadInterrupted, True),
        (500, DownloadInterrupted, True),
        (503, DownloadInterrupted, True),
        (400, DownloadError, False),
        (401, DownloadRefused, False),
        (304, DownloadError, False),
    ],
)
async def test_each_refusal_is_its_own_error(
    status: int,
    kind: type[DownloadError],
    retryable: bool,  # noqa: FBT001 - a column
    destination: Path,
) -> None:
    """Dead for ever, for now, or nothing to be done; always of an image that was paid for."""
    response = httpx.Response(status, content=HTML, headers={"Retry-After": "700"})
    async with make_client(lambda _: response) as client:
        with pytest.raises(DownloadError) as raised:
            await client.download(PUBLIC, destination, expected="jpeg")
    error = raised.value
    assert type(error) is kind
    assert (error.retryable, error.billed) == (retryable, Billed.YES)
    assert error.retry_after == (700 if kind is DownloadInterrupted else None)
    assert "93.184.215.14" in error.message
    assert "secret" not in error.message
    assert left_behind(destination) == []


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_a_busy_host_is_asked_again_when_it_says(status: int, form: str, jpeg: bytes, destination: Path) -> None:
    """Once, after the delay that it requested in either form, and not as a failure of the row."""
    asked: list[float] = []

    def handler(_: httpx.Request) -> httpx.Response:
        asked.append(time.time())
        if len(asked) > 1:
            return httpx.Response(200, content=jpeg)
        delay = "1.2" if form == "seconds" else format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2))
        return httpx.Response(status, headers={"Retry-After": delay})

    async with make_client(handler) as client:
        await client.download(PUBLIC, destination, expected="jpeg")
    first, second = asked
    assert 0.9 < second - first < 4


async def test_a_delay_beyond_the_deadline_is_not_waited_for(destination: Path) -> None:
    """The error comes at once, with the delay in it: Prefect's retries come later."""
    response = httpx.Response(429, headers={"Retry-After": "30"})
    async with make_client(lambda _: response, timeouts=Timeouts(download=20)) as client:
        with anyio.fail_after(5), pytest.raises(DownloadInterrupted) as raised:
            await client.download(PUBLIC, destination, expected="jpeg")
    assert raised.value.retry_after == 30


async def test_a_host_that_is_always_busy_is_given_up(destination: Path) -> None:
    """At the deadline of the download, with a half second between two requests at the least."""
    asked: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(503, headers={"Retry-After": "0"})

    async with make_client(handler, timeouts=Timeouts(download=1)) as client:
        with pytest.raises(DownloadInterrupted):
            await client.download(PUBLIC, destination, expected="jpeg")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("body", "what"), [(HTML, "a page of HTML"), (b"", "an empty file"), (b'{"error": 1}', "JSON")]
)
async def test_a_page_with_status_200_is_no_image(body: bytes, what: str, destination: Path) -> None:
    """Hosts say so when a URL ran out, and it may be different the next time."""
    async with make_client(lambda _: httpx.Response(200, content=body)) as client:
        with pytest.raises(NotAnImage, match=what) as raised:
            await client.download(PUBLIC, destination, expected="jpeg")
    assert raised.value.retryable
    assert left_behind(destination) == []


@pytest.mark.parametrize(
    "url",
    ["data:image/jpeg;base64,%%%", "data:image/jpeg;base64,aGk", "data:", "data:image/jpeg", data_uri(HTML)],
)
async def test_a_broken_inline_image_is_final(url: str, destination: Path) -> None:
    """The same bytes would come again."""
    async with make_client() as client:
        with pytest.raises(NotAnImage) as raised:
            await client.download(url, destination, expected="jpeg")
    assert not raised.value.retryable
    assert left_behind(destination) == []


async def test_a_whole_image_of_another_format_is_kept_beside(png: bytes, destination: Path) -> None:
    """It was paid for: the message says where it is."""
    async with make_client(lambda _: httpx.Response(200, content=png)) as client:
        with pytest.raises(UnexpectedFormat) as raised:
            await client.download(PUBLIC, destination, expected="jpeg")
    kept = destination.with_name("image.jpeg.rejected")
    assert kept.read_bytes() == png
    assert str(kept) in raised.value.message
    assert left_behind(destination) == ["image.jpeg.rejected"]


async def test_a_cut_image_without_a_length_is_found(jpeg: bytes, destination: Path) -> None:
    """Only decoding it shows the cut."""
    async with make_client(lambda _: httpx.Response(200, content=_stream(jpeg[:-100]))) as client:
        with pytest.raises(BrokenImage, match="cut or broken"):
            await client.download(PUBLIC, destination, expected="jpeg")
    assert left_behind(destination) == ["image.jpeg.suspect"]


WIDE = ExpectedShape(1568, 672, "the service announced", is_ratio=False)


@pytest.mark.parametrize("fault", ["broken", "placeholder"])
async def test_the_same_wrong_bytes_twice_are_what_the_service_delivers(
    fault: str, jpeg: bytes, destination: Path
) -> None:
    """The first time may be an accident. The second time the error is final, and the bytes are kept."""
    body = jpeg[:-100] if fault == "broken" else jpeg
    errors = []
    async with make_client(lambda _: httpx.Response(200, content=body)) as client:
        for _ in range(2):
            with pytest.raises((BrokenImage, UnexpectedSize)) as raised:
                await client.download(PUBLIC, destination, expected="jpeg", shape=WIDE)
            errors.append(raised.value)
    assert [type(error) for error in errors] == [BrokenImage if fault == "broken" else UnexpectedSize] * 2
    assert [error.retryable for error in errors] == [True, False]
    assert "twice with the same bytes" in errors[1].message
    assert left_behind(destination) == ["image.jpeg.rejected"]
    assert destination.with_name("image.jpeg.rejected").read_bytes() == body


async def test_other_wrong_bytes_are_another_accident(jpeg: bytes, destination: Path) -> None:
    """A line that cuts here and there is asked again, and the whole image ends the matter."""
    bodies = [jpeg[:-100], jpeg[:-90], jpeg[:-100], jpeg]
    async with make_client(lambda _: httpx.Response(200, content=_stream(bodies.pop(0)))) as client:
        for _ in range(3):
            with pytest.raises(BrokenImage) as raised:
                await client.download(PUBLIC, destination, expected="jpeg")
            assert raised.value.retryable
        await client.download(PUBLIC, destination, expected="jpeg")
    assert left_behind(destination) == ["image.jpeg"]


@pytest.mark.parametrize("cut", [0, 100])
async def test_wrong_bytes_inside_the_answer_are_final_at_once(cut: int, jpeg: bytes, destination: Path) -> None:
    """They would be the same for ever."""
    async with make_client() as client:
        with pytest.raises((BrokenImage, UnexpectedSize), match="inside the service's answer") as raised:
            await client.download(data_uri(jpeg[: len(jpeg) - cut]), destination, expected="jpeg", shape=WIDE)
    assert not raised.value.retryable
    assert left_behind(destination) == ["image.jpeg.rejected"]


async def _stream(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_fewer_bytes_than_announced_are_a_cut(jpeg: bytes, destination: Path) -> None:
    """Also where the bytes that came decode."""
    headers = {"Content-Length": str(len(jpeg) + 10)}
    async with make_client(lambda _: httpx.Response(200, content=_stream(jpeg), headers=headers)) as client:
        with pytest.raises(DownloadInterrupted, match="was cut"):
            await client.download(PUBLIC, destination, expected="jpeg")
    assert left_behind(destination) == []


async def _closes(writer: asyncio.StreamWriter, jpeg: bytes) -> None:
    writer.write(answer(jpeg[:300], length=len(jpeg)))


async def _resets(writer: asyncio.StreamWriter, jpeg: bytes) -> None:
    writer.write(answer(jpeg[:300], length=len(jpeg)))
    await writer.drain()
    await asyncio.sleep(0.02)
    reset(writer)


async def _cuts_a_chunk(writer: asyncio.StreamWriter, jpeg: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n" + jpeg[:300])


async def _is_no_http(writer: asyncio.StreamWriter, _: bytes) -> None:
    writer.write(b"SSH-2.0-nothing\r\n\r\n")


async def _stalls(writer: asyncio.StreamWriter, jpeg: bytes) -> None:
    writer.write(answer(jpeg[:300], length=len(jpeg)))
    await asyncio.sleep(30)


async def _trickles(writer: asyncio.StreamWriter, jpeg: bytes) -> None:
    writer.write(answer(b"", length=len(jpeg)))
    for byte in jpeg:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("trouble", [_closes, _resets, _cuts_a_chunk, _is_no_http, _stalls, _trickles])
async def test_a_broken_download_can_be_repeated(trouble: Any, jpeg: bytes, destination: Path) -> None:
    """Cut, reset, stalled or too slow over a real socket: nothing is left, and the next one works."""
    troubled = True

    async def handler(writer: asyncio.StreamWriter) -> None:
        if troubled:
            await trouble(writer, jpeg)
        else:
            writer.write(answer(jpeg))

    async with (
        serve(handler) as server,
        make_client(base_url=server.url, timeouts=Timeouts(download_read=0.1, download=0.3)) as client,
    ):
        with anyio.fail_after(5), pytest.raises(DownloadInterrupted) as raised:
            await client.download(f"{server.url}/one.jpg", destination, expected="jpeg")
        assert raised.value.retryable
        assert left_behind(destination) == []
        troubled = False
        await client.download(f"{server.url}/one.jpg", destination, expected="jpeg")
    assert destination.read_bytes() == jpeg


async def test_a_failed_download_leaves_the_file_that_was_there(jpeg: bytes, destination: Path) -> None:
    """A destination is never half a file."""
    destination.parent.mkdir()
    destination.write_bytes(jpeg)
    async with make_client(lambda _: httpx.Response(200, content=jpeg[:-9])) as client:
        with pytest.raises(NotAnImage):
            await client.download(PUBLIC, destination, expected="jpeg")
    assert destination.read_bytes() == jpeg


async def test_a_cancelled_download_leaves_nothing(jpeg: bytes, destination: Path) -> None:
    """And the cancellation comes through."""
    begun = asyncio.Event()

    async def handler(writer: asyncio.StreamWriter) -> None:
        begun.set()
        await _stalls(writer, jpeg)

    async with serve(handler) as server, make_client(base_url=server.url) as client:
        download = asyncio.create_task(client.download(f"{server.url}/1", destination, expected="jpeg"))
        await begun.wait()
        await asyncio.sleep(0.02)
        (part,) = left_behind(destination)
        remove_abandoned(destination.with_name(part))  # as a sweep would
        assert left_behind(destination) == [part]
        download.cancel()
        with pytest.raises(asyncio.CancelledError):
            await download
    assert left_behind(destination) == []


# Caps


async def test_too_many_announced_bytes_are_not_read(destination: Path) -> None:
    """The first byte of the body is never asked for."""

    async def body() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    headers = {"Content-Length": "100001"}
    async with make_client(lambda _: httpx.Response(200, content=body(), headers=headers)) as client:
        with pytest.raises(ImageTooLarge, match="100,001 bytes, over the limit of 100,000"):
            await client.download(PUBLIC, destination, expected="jpeg")
    assert left_behind(destination) == []


async def test_a_body_without_end_is_not_read_to_its_end(destination: Path) -> None:
    """With no length announced, the cap holds on what comes."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 50_000
            yield b"\xff" * 50_000

    async with make_client(lambda _: httpx.Response(200, content=endless())) as client:
        with pytest.raises(ImageTooLarge):
            await client.download(PUBLIC, destination, expected="jpeg")
    assert sent < 500_000
    assert left_behind(destination) == []


@pytest.mark.parametrize("size", [100_001, 1_000_000])
async def test_an_inline_image_has_the_same_cap(size: int, destination: Path) -> None:
    """In bytes after decoding."""
    async with make_client() as client:
        with pytest.raises(ImageTooLarge, match="max_bytes"):
            await client.download(data_uri(b"\xff" * size), destination, expected="jpeg")


# The disk


async def test_a_spool_that_cannot_be_made_is_named(jpeg: bytes, tmp_path: Path) -> None:
    """With the folder, the reason and what to do; repeating the same does not help."""
    (tmp_path / "file").write_text("in the way")
    async with make_client(lambda _: httpx.Response(200, content=jpeg)) as client:
        with pytest.raises(DownloadError) as raised:
            await client.download(PUBLIC, tmp_path / "file" / "image.jpeg", expected="jpeg")
    assert type(raised.value) is ImageUnwritable
    assert str(tmp_path / "file") in raised.value.message
    assert not raised.value.retryable
    assert raised.value.billed is Billed.YES


@pytest.mark.parametrize("max_unwritten", [0, 1_000_000])
async def test_a_full_disk_is_named(
    jpeg: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_unwritten: int
) -> None:
    """The kernel's own full device takes the place of the part file, for an image written in pieces and at once."""
    monkeypatch.setattr(downloads, "_MAX_UNWRITTEN", max_unwritten)
    full = tmp_path / "full.part"
    full.symlink_to("/dev/full")
    monkeypatch.setattr(downloads, "part_path", lambda _: full)
    async with make_client(lambda _: httpx.Response(200, content=jpeg)) as client:
        with pytest.raises(DownloadError, match="No space left") as raised:
            await client.download(PUBLIC, tmp_path / "image.jpeg", expected="jpeg")
    assert str(tmp_path) in raised.value.message
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert left_behind(tmp_path / "image.jpeg") == []


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://93.184.215.14/one.jpg",
        "ftp://93.184.215.14/one.jpg",
        "file:///etc/passwd",
        "//93.184.215.14/one.jpg",
        "one.jpg",
        "",
        "https://",
        "https:///one.jpg",
        "https://[::1",
        "https://\x00/",
        f"https://{'a' * 70}.example/",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://localhost/",
        "https://10.0.0.1/",
        "https://172.16.0.1/",
        "https://192.168.1.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://100.64.0.1/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://240.0.0.1/",
        "https://255.255.255.255/",
        "https://[::1]/",
        "https://[::]/",
        "https://[fe80::1]/",
        "https://[fd00::1]/",
        "https://[ff02::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:169.254.169.254]/",
        "https://[64:ff9b::10.0.0.1]/",
        "https://[2002:7f00:1::]/",
    ],
)
async def test_a_url_into_a_private_network_is_not_fetched(url: str, destination: Path) -> None:
    """Nor one that is not https: no request goes out."""

    def handler(_: httpx.Request) -> httpx.Response:
        pytest.fail("something was fetched")

    async with make_client(handler) as client:
        with pytest.raises((UnsafeURL, DownloadInterrupted)) as raised:
            await client.download(url, destination, expected="jpeg")
    assert isinstance(raised.value, UnsafeURL) or "looked up" in raised.value.message
    assert left_behind(destination) == []


async def test_an_ipv6_only_network_reaches_public_addresses(jpeg: bytes, destination: Path) -> None:
    """There every IPv4 host looks like a reserved IPv6 address with the real one inside (NAT64)."""
    async with make_client(lambda _: httpx.Response(200, content=jpeg)) as client:
        await client.download("https://[64:ff9b::93.184.215.14]/", destination, expected="jpeg")
    assert destination.read_bytes() == jpeg


async def test_a_redirect_into_a_private_network_is_not_followed(destination: Path) -> None:
    """Each step is checked as the first one."""
    hosts: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return httpx.Response(302, headers={"Location": "https://169.254.169.254/latest/meta-data/"})

    async with make_client(handler) as client:
        with pytest.raises(UnsafeURL, match=r"169\.254\.169\.254"):
            await client.download(PUBLIC, destination, expected="jpeg")
    assert hosts == ["93.184.215.14"]


@pytest.mark.parametrize("location", ["http://93.184.215.14/two.jpg", "https://", "gopher://x"])
async def test_a_redirect_to_no_safe_url_is_not_followed(location: str, destination: Path) -> None:
    """From https to http, or to nonsense."""
    async with make_client(lambda _: httpx.Response(302, headers={"Location": location})) as client:
        with pytest.raises(UnsafeURL):
            await client.download(PUBLIC, destination, expected="jpeg")


async def test_redirects_without_end_are_given_up(destination: Path) -> None:
    """After five."""
    count = 0

    def handler(_: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1
        return httpx.Response(302, headers={"Location": "/again"})

    async with make_client(handler) as client:
        with pytest.raises(UnsafeURL, match="more than 5 times"):
            await client.download(PUBLIC, destination, expected="jpeg")
    assert count == 6


async def test_the_address_that_is_connected_to_is_checked(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads to the world when the URL is checked and into the house when it is connected to."""
    answers = iter(["93.184.215.14", "127.0.0.1"])

    def getaddrinfo(_host: object, port: int, *_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"inside"))

    async with serve(handler) as inside, make_client(base_url="http://93.184.215.13") as client:
        port = inside.url.rpartition(":")[2]
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        with pytest.raises(UnsafeURL, match=r"images\.example is 127\.0\.0\.1"):
            await client.download(f"http://images.example:{port}/one.jpg", destination, expected="jpeg")
        assert inside.requests == []


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/", "http://[::1]:9/", "http://10.0.0.1/", "https://192.168.1.1/", "http://93.184.215.14/"],
)
async def test_a_service_in_a_private_network_may_keep_its_images_there(
    url: str, jpeg: bytes, destination: Path
) -> None:
    """As the local stand-in does."""
    async with make_client(lambda _: httpx.Response(200, content=jpeg), base_url="http://localhost:8000") as client:
        await client.download(url, destination, expected="jpeg")
    assert destination.read_bytes() == jpeg


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "0.0.0.0", "224.0.0.1"])  # noqa: S104 - fetched from, not bound
async def test_cloud_metadata_is_never_an_image(host: str, destination: Path) -> None:
    """Not even for a stand-in on this machine."""
    async with make_client(lambda _: httpx.Response(200), base_url="http://127.0.0.1:8000") as client:
        with pytest.raises(UnsafeURL):
            await client.download(f"http://{host}/", destination, expected="jpeg")


async def test_a_proxy_of_the_environment_is_used(
    jpeg: bytes, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address reached is the proxy's then, so the one asked for is checked and the other is not."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(jpeg))

    async with serve(handler) as proxy, make_client(base_url="http://93.184.215.13") as client:
        monkeypatch.setenv("http_proxy", proxy.url.removeprefix("http://"))
        monkeypatch.delenv("no_proxy", raising=False)
        await client.download("http://93.184.215.14/one.jpg", destination, expected="jpeg")
        assert proxy.requests[0].startswith("GET http://93.184.215.14/one.jpg HTTP/1.1")
        with pytest.raises(UnsafeURL):
            await client.download("http://10.0.0.1/one.jpg", destination, expected="jpeg")
        assert len(proxy.requests) == 1
    assert destination.read_bytes() == jpeg


async def test_a_host_outside_of_the_proxy_is_reached_directly(
    jpeg: bytes, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As no_proxy says."""

    async def handler(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(jpeg))

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with serve(handler) as server, make_client(base_url=server.url) as client:
        await client.download(f"{server.url}/one.jpg", destination, expected="jpeg")
    assert destination.read_bytes() == jpeg
