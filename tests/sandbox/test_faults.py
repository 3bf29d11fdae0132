from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest
from PIL import Image, UnidentifiedImageError

from flux_prefect.sandbox.control import SandboxRefused
from flux_prefect.sandbox.faults import FAULTS
from flux_prefect.sandbox.launching import RunningSandbox

from .plain_client import PlainClient


@dataclass(frozen=True)
class Seen:
    """One fault and what a plain client sees of it.

    Attributes:
        outcome: the status, or the httpx error that is raised.
        billed: whether the ledger shows the call as billed.
        check: what else holds of the answer.
    """

    fault: str
    outcome: int | type[httpx.HTTPError]
    billed: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    check: Callable[[httpx.Response], object] = lambda _: True


def _is_html(answer: httpx.Response) -> bool:
    return answer.headers["content-type"].startswith("text/html") and "<html>" in answer.text


def _is_black(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("L").getextrema() == (0, 0)


def _delivers_black(answer: httpx.Response) -> bool:
    return _is_black(httpx.get(answer.json()["images"][0]["url"], trust_env=False).content)


def _is_no_json(answer: httpx.Response) -> bool:
    try:
        answer.json()
    except ValueError:
        return answer.headers["content-type"] == "application/json" and "x-aimlapi-credits-used" in answer.headers
    return False


def _in_half_a_minute(answer: httpx.Response) -> bool:
    moment = parsedate_to_datetime(answer.headers["retry-after"])
    return 25 <= moment.timestamp() - time.time() <= 31


GENERATION = [
    Seen("rate_limited", 429, check=lambda answer: "retry-after" not in answer.headers),
    Seen("rate_limited", 429, arguments={"retry_after": 2}, check=lambda answer: answer.headers["retry-after"] == "2"),
    Seen("rate_limited", 429, arguments={"retry_after": "date+30"}, check=_in_half_a_minute),
    Seen(
        "overloaded", 503, arguments={"retry_after": 0.5}, check=lambda answer: answer.headers["retry-after"] == "0.5"
    ),
    Seen("server_error", 500, check=lambda answer: answer.json()["message"]),
    Seen("bad_gateway", 502, check=_is_html),
    Seen("gateway_timeout_unbilled", 504, check=lambda answer: answer.json()["message"] == "Generation timeout"),
    Seen("gateway_timeout_billed", 504, billed=True),
    Seen("reset_before_work", httpx.ReadError),
    Seen("reset_after_work", httpx.ReadError, billed=True),
    Seen("hang", httpx.RemoteProtocolError, arguments={"seconds": 0.2}),
    Seen("hang", httpx.ReadTimeout),
    Seen("hang_billed", httpx.ReadTimeout, billed=True),
    Seen(
        "slow_trickle",
        200,
        billed=True,
        arguments={"seconds": 0.5},
        check=lambda answer: answer.elapsed.total_seconds() >= 0.5 and answer.json()["images"],
    ),
    Seen("moderation", 400, check=lambda answer: "moderation" in answer.json()["message"]),
    Seen(
        "flagged",
        200,
        billed=True,
        check=lambda answer: answer.json()["has_nsfw_concepts"] == [True] and _delivers_black(answer),
    ),
    Seen(
        "black",
        200,
        billed=True,
        check=lambda answer: answer.json()["has_nsfw_concepts"] == [False] and _delivers_black(answer),
    ),
    Seen("out_of_credits", 403, check=lambda answer: "run out of credits" in answer.json()["message"]),
    Seen("forbidden", 403, check=lambda answer: "credits" not in answer.json()["message"]),
    Seen("unauthorized", 401),
    Seen("not_found", 404),
    Seen("empty_list", 200, billed=True, check=lambda answer: answer.json()["images"] == []),
    Seen("null_data", 200, billed=True, check=lambda answer: answer.json()["data"] is None),
    Seen("invalid_json", 200, billed=True, check=_is_no_json),
    Seen("html_200", 200, billed=True, check=_is_html),
    Seen("cut_json", httpx.RemoteProtocolError, billed=True),
    Seen("wrong_seed", 200, billed=True, check=lambda answer: answer.json()["seed"] == 8),
    Seen("fewer_images", 200, billed=True, check=lambda answer: answer.json()["images"] == []),
]


@pytest.mark.parametrize("seen", GENERATION, ids=lambda seen: f"{seen.fault}-{seen.outcome}")
def test_a_generation_fault_is_seen_once_and_billed_or_not(
    seen: Seen, client: PlainClient, sandbox: RunningSandbox
) -> None:
    """The client sees what the fault's name says, the ledger says whether it was paid, the next call is fine."""
    client.http.timeout = httpx.Timeout(0.8)
    sandbox.control.inject(seen.fault, **seen.arguments)

    if isinstance(seen.outcome, int):
        answer = client.post()
        assert answer.status_code == seen.outcome
        assert seen.check(answer)
    else:
        with pytest.raises(seen.outcome):
            client.post()

    (row,) = sandbox.control.ledger().rows
    assert (row.fault, row.billed, row.credits) == (seen.fault, seen.billed, 168_000 if seen.billed else 0)
    assert FAULTS[seen.fault].billed == seen.billed
    answered = seen.outcome if isinstance(seen.outcome, int) else 200 if seen.fault == "cut_json" else None
    assert row.status == answered
    assert client.post().status_code == 200


def _is_whole(answer: httpx.Response, output_format: str) -> bool:
    with Image.open(io.BytesIO(answer.content)) as image:
        image.load()
        return image.format == output_format and answer.headers["content-type"] == f"image/{output_format.lower()}"


def _starts_like_a_jpeg_and_breaks(answer: httpx.Response) -> bool:
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.content.startswith(b"\xff\xd8\xff")
    assert int(answer.headers["content-length"]) == len(answer.content)
    try:
        with Image.open(io.BytesIO(answer.content)) as image:
            image.load()
    except (OSError, SyntaxError, UnidentifiedImageError):
        return True
    return False


def _claims_to_be_enormous(answer: httpx.Response) -> bool:
    assert len(answer.content) < 2_000
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(io.BytesIO(answer.content)) as image:
            return image.size == (65_500, 65_500)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


DOWNLOAD = [
    Seen("dead_url", 404),
    Seen("gone_403", 403, check=lambda answer: "AccessDenied" in answer.text),
    Seen("cut_download", httpx.RemoteProtocolError),
    Seen("reset_download", httpx.ReadError),
    Seen("stall_download", httpx.ReadTimeout),
    Seen("stall_download", httpx.RemoteProtocolError, arguments={"seconds": 0.1}),
    Seen("html_download", 200, check=_is_html),
    Seen("wrong_type", 200, check=lambda answer: _is_whole(answer, "PNG")),
    Seen("corrupt_download", 200, check=_starts_like_a_jpeg_and_breaks),
    Seen("truncated_image", 200, check=_starts_like_a_jpeg_and_breaks),
    Seen(
        "huge_download",
        200,
        arguments={"megabytes": 3},
        check=lambda answer: len(answer.content) == 3_000_000 and "content-length" not in answer.headers,
    ),
    Seen("bomb", 200, check=_claims_to_be_enormous),
    Seen("download_503", 503, arguments={"retry_after": 3}, check=lambda answer: answer.headers["retry-after"] == "3"),
    Seen("redirect_loop", httpx.TooManyRedirects),
    Seen(
        "redirect_private",
        302,
        check=lambda answer: answer.headers["location"] == "http://169.254.169.254/latest/meta-data/",
    ),
    Seen(
        "redirect_private",
        302,
        arguments={"location": "file:///etc/hostname"},
        check=lambda answer: answer.headers["location"] == "file:///etc/hostname",
    ),
]


@pytest.mark.parametrize("seen", DOWNLOAD, ids=lambda seen: f"{seen.fault}-{seen.outcome}")
def test_a_download_fault_is_seen_once_and_the_image_is_still_there(
    seen: Seen, client: PlainClient, sandbox: RunningSandbox
) -> None:
    """The client sees what the fault's name says; the same URL gives the image the next time."""
    client.http.timeout = httpx.Timeout(0.8)
    url = client.url()
    sandbox.control.inject(seen.fault, **seen.arguments)
    follow = seen.outcome is httpx.TooManyRedirects

    if isinstance(seen.outcome, int):
        answer = client.http.get(url)
        assert answer.status_code == seen.outcome
        assert seen.check(answer)
    else:
        with pytest.raises(seen.outcome):
            client.http.get(url, follow_redirects=follow)

    assert _is_whole(client.http.get(url), "JPEG")
    summary = sandbox.control.summary()
    assert (summary.billed_calls, summary.downloads) == (1, 2)


@pytest.mark.parametrize(("fault", "kind"), [("wrong_type", "JPEG"), ("bomb", None)])
def test_faults_of_the_format_know_png_too(
    fault: str, kind: str | None, client: PlainClient, sandbox: RunningSandbox
) -> None:
    """Where PNG was asked for, the wrong type is JPEG and the bomb a PNG."""
    url = client.url(output_format="png")
    sandbox.control.inject(fault)
    answer = client.http.get(url)
    assert _is_whole(answer, kind) if kind else _claims_to_be_enormous(answer)


def test_every_fault_is_tested_here() -> None:
    """A fault added to the registry needs a line in one of the tables."""
    assert {seen.fault for seen in GENERATION + DOWNLOAD} == set(FAULTS)


def test_a_client_that_leaves_an_endless_body_ends_it(client: PlainClient, sandbox: RunningSandbox) -> None:
    """The sandbox stops sending and goes on serving."""
    url = client.url()
    sandbox.control.inject("huge_download")
    with client.http.stream("GET", url) as answer:
        assert next(answer.iter_bytes())
    assert client.image()


def test_a_fault_strikes_as_often_as_set_and_where_the_prompt_says(
    client: PlainClient, sandbox: RunningSandbox
) -> None:
    """Two times for the prompts that hold a word; others are left alone."""
    sandbox.control.inject("server_error", times=2, prompt_contains="fox")
    prompts = ["A fox", "A bear", "Another fox", "The third fox"]
    assert [client.post(prompt=prompt).status_code for prompt in prompts] == [500, 200, 500, 200]


def test_a_fault_without_end_lasts_until_it_is_cleared(client: PlainClient, sandbox: RunningSandbox) -> None:
    """`times` None means every call."""
    sandbox.control.inject("overloaded", times=None)
    assert [client.post().status_code for _ in range(3)] == [503, 503, 503]
    sandbox.control.clear_faults()
    assert client.post().status_code == 200


def test_faults_of_one_kind_strike_in_the_order_they_were_armed(client: PlainClient, sandbox: RunningSandbox) -> None:
    """A script of failures can be laid out beforehand, and be read back."""
    for fault in ("rate_limited", "server_error", "overloaded"):
        sandbox.control.inject(fault)
    armed = client.http.get("/sandbox/faults").json()
    assert [fault["fault"] for fault in armed] == ["rate_limited", "server_error", "overloaded"]
    assert [client.post().status_code for _ in range(4)] == [429, 500, 503, 200]


@pytest.mark.parametrize(
    ("fault", "arguments", "reason"),
    [
        ("no_such_fault", {}, "rate_limited"),
        ("rate_limited", {"retry_atfer": 1}, "retry_atfer"),
        ("hang", {"seconds": -1}, "seconds"),
        ("hang", {"times": 0}, "times"),
        ("rate_limited", {"retry_after": "1\r\nX: y"}, "retry_after"),
    ],
)
def test_a_wrong_fault_is_refused_with_the_reason(
    fault: str, arguments: dict[str, Any], reason: str, sandbox: RunningSandbox
) -> None:
    """A misspelt name or argument never passes silently."""
    with pytest.raises(SandboxRefused, match=reason):
        sandbox.control.inject(fault, **arguments)


def test_every_fault_is_described(sandbox: RunningSandbox) -> None:
    """The names come with a line each."""
    names = sandbox.control.fault_names()
    assert set(names) == set(FAULTS)
    assert all(line and "\n" not in line for line in names.values())
