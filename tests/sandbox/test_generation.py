from __future__ import annotations

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from flux_prefect.sandbox.launching import RunningSandbox

from .plain_client import MODEL, PlainClient

PRICE = 168_000


def test_an_answer_has_the_documented_sample_form(client: PlainClient) -> None:
    """By default the body is the one that the service's page shows, with the cost."""
    answer = client.post(aspect_ratio="21:9", headers={"X-Client-Request-Id": "run-1:row.2_3"})

    body = answer.json()
    assert body["images"][0] | {"url": ""} == {
        "url": "",
        "width": 1568,
        "height": 672,
        "content_type": "image/jpeg",
    }
    assert body["seed"] == 7
    assert body["has_nsfw_concepts"] == [False]
    assert body["prompt"] == "A boat on the sea"
    assert body["meta"]["usage"]["credits_used"] == PRICE
    assert answer.headers["x-client-request-id"] == "run-1:row.2_3"
    assert answer.headers["x-aimlapi-credits-used"] == str(PRICE)
    assert answer.headers["x-aimlapi-usd-spent"] == "0.084"
    assert answer.headers["x-inference-id"]


@pytest.mark.parametrize("shape", ["images", "data", "b64", "data_uri", "both"])
def test_every_shape_leads_to_the_same_image(shape: str, client: PlainClient, sandbox: RunningSandbox) -> None:
    """The shape of the answer decides where the bytes are, never what they are."""
    expected = client.image()
    sandbox.control.settings(response_shape=shape)

    body = client.post().json()

    found = []
    for item in body.get("images", []) + body.get("data", []):
        url, inline = item.get("url"), item.get("b64_json")
        if url is None:
            found.append(base64.b64decode(inline))
        elif url.startswith("data:image/jpeg;base64,"):
            found.append(base64.b64decode(url.partition(",")[2]))
        else:
            found.append(client.http.get(url).content)
    assert len(found) == (2 if shape == "both" else 1)
    assert set(found) == {expected}


def test_the_request_decides_every_byte(client: PlainClient) -> None:
    """The same request gives the same bytes again; any field that is changed gives others."""
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "A boat on the sea."},
        {"aspect_ratio": "1:1"},
        {"output_format": "png"},
        {"guidance_scale": 4.5},
        {"safety_tolerance": "5"},
        {"model": "flux/kontext-pro/text-to-image"},
    ]
    first = client.image()
    assert client.image() == first
    assert len({first, *(client.image(**change) for change in changes)}) == 1 + len(changes)


def test_several_images_are_different_and_all_paid_for(client: PlainClient, sandbox: RunningSandbox) -> None:
    """Four images of one call are four images, at four times the price."""
    answer = client.post(num_images=4)

    skies = set()
    for answered in answer.json()["images"]:
        with Image.open(io.BytesIO(client.http.get(answered["url"]).content)) as image:
            # The captions differ in any case: look above them.
            skies.add(image.crop((0, 0, image.width, image.height // 2)).tobytes())
    assert len(skies) == 4
    assert answer.headers["x-aimlapi-credits-used"] == str(4 * PRICE)
    summary = sandbox.control.summary()
    assert (summary.billed_calls, summary.billed_images, summary.credits) == (1, 4, 4 * PRICE)


def test_without_a_seed_the_service_draws_one_and_says_it(client: PlainClient) -> None:
    """The reported seed asks for the same image again."""
    body = {"model": MODEL, "prompt": "A fox"}
    first = client.http.post("/v1/images/generations", json=body).json()
    second = client.http.post("/v1/images/generations", json=body).json()

    assert first["seed"] != second["seed"]
    drawn = client.http.get(first["images"][0]["url"]).content
    assert client.image(prompt="A fox", seed=first["seed"]) == drawn


def test_credits_go_down_until_they_are_used_up(client: PlainClient, sandbox: RunningSandbox) -> None:
    """The balance pays for two images and no third; a refused call costs nothing."""
    sandbox.control.settings(balance=2 * PRICE + 1)

    statuses = [client.post(seed=seed).status_code for seed in (1, 2, 3)]

    assert statuses == [200, 200, 403]
    assert "run out of credits" in client.post().json()["message"]
    assert client.http.get("/v2/billing").json() == {"current_balance": 1 / 2_000_000, "currency": "USD"}
    assert client.http.get("/v1/billing/balance").json()["balance"] == 1
    summary = sandbox.control.summary()
    assert (summary.calls, summary.billed_calls, summary.refused) == (4, 2, 2)
    assert summary.credits == 2 * PRICE


def test_calls_at_once_never_overdraw_the_balance(client: PlainClient, sandbox: RunningSandbox) -> None:
    """Of six calls that all find credits at their start, only those that are covered at the end are billed."""
    sandbox.control.settings(balance=2 * PRICE, latency=0.2)
    with ThreadPoolExecutor(6) as pool:
        statuses = sorted(pool.map(lambda seed: client.post(seed=seed).status_code, range(1, 7)))
    assert statuses == [200, 200, 403, 403, 403, 403]
    assert sandbox.control.summary().balance == 0


@pytest.mark.parametrize("bad", ["a" * 129, "with space", "sl/ash", "a,b"])
def test_an_invalid_client_id_is_dropped_and_the_call_billed(
    bad: str, client: PlainClient, sandbox: RunningSandbox
) -> None:
    """As at the service: no error, no echo, the money is gone."""
    answer = client.post(headers={"X-Client-Request-Id": bad})
    assert answer.status_code == 200
    assert "x-client-request-id" not in answer.headers
    row = sandbox.control.ledger().rows[0]
    assert (row.client_request_id, row.billed) == (None, True)


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sandbox-key"}],
)
def test_a_missing_or_wrong_key_is_401(headers: dict[str, str], client: PlainClient, sandbox: RunningSandbox) -> None:
    """For generations, billing and logs; nothing is billed, and the prompt isn't written down."""
    assert client.post(headers=headers).status_code == 401
    for path in ("/v2/billing", "/v1/billing/balance", "/v2/logs"):
        assert client.http.get(path, headers=headers).status_code == 401
    row = sandbox.control.ledger().rows[0]
    assert (row.status, row.billed, row.prompt) == (401, False, None)


def test_the_key_is_written_nowhere(client: PlainClient, running: RunningSandbox) -> None:
    """Neither answers, nor the ledger, nor any file of the data folder hold it."""
    key = running.environment["AIMLAPI_KEY"]
    client.post()
    refused = client.post(headers={"Authorization": f"Bearer {key}x"})
    assert key not in refused.text
    assert key not in running.control.ledger().model_dump_json()
    files = [path for path in running.data.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if key.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "flux/other"},
        {"prompt": "a" * 4001},
        {"prompt": None},
        {"seed": 0},
        {"seed": 1.5},
        {"seed": None},
        {"seed": "7"},
        {"num_images": 5},
        {"num_images": True},
        {"guidance_scale": 0.5},
        {"safety_tolerance": 2},
        {"output_format": "webp"},
        {"aspect_ratio": "5:4"},
    ],
)
def test_what_the_schema_forbids_is_400(fields: dict[str, Any], client: PlainClient, sandbox: RunningSandbox) -> None:
    """With the field's name, and at no cost."""
    answer = client.post(**fields)
    assert answer.status_code == 400
    assert next(iter(fields)) in answer.json()["message"]
    assert sandbox.control.summary().billed_calls == 0


def test_what_the_schema_allows_is_taken(client: PlainClient) -> None:
    """Unknown fields are ignored; an empty prompt, 7.0 as an integer and a seed of any size are fine."""
    assert client.post(unknown=1).status_code == 200
    assert client.post(prompt="").status_code == 200
    assert client.post(seed=7.0).json()["seed"] == 7
    assert client.image(seed=10**30)
    assert len(client.post(num_images=2.5).json()["images"]) == 2


@pytest.mark.parametrize(
    ("envelope", "media_type"),
    [("problem", "application/problem+json"), ("plain", "application/json")],
)
def test_both_envelopes(envelope: str, media_type: str, client: PlainClient, sandbox: RunningSandbox) -> None:
    """Errors come in the envelope that is set."""
    sandbox.control.settings(envelope=envelope)
    answer = client.post(seed=0)
    body = answer.json()
    assert answer.headers["content-type"] == media_type
    fields = {"message", "requestId", "timestamp"}
    if envelope == "problem":
        assert set(body) == fields | {"title", "status", "instance", "error"}
        assert (body["status"], body["instance"]) == (400, "/v1/images/generations")
    else:
        assert set(body) == fields | {"path", "statusCode"}
        assert (int(body["statusCode"]), body["path"]) == (400, "/v1/images/generations")


def test_mixed_envelopes_by_status(client: PlainClient) -> None:
    """Unless set otherwise, 401 and 404 come plain and 400 as problem+json."""
    assert client.post(seed=0).headers["content-type"] == "application/problem+json"
    assert client.post(headers={"Authorization": ""}).headers["content-type"] == "application/json"
    assert client.http.get("/nowhere").json()["path"] == "/nowhere"


def test_a_result_url_dies_after_its_time(client: PlainClient, sandbox: RunningSandbox) -> None:
    """A URL is 404 once its time is over, and keeps the time that was set when it was made."""
    lasting = client.url()
    sandbox.control.settings(url_ttl=0.2)
    short = client.url()
    assert client.http.get(short).status_code == 200
    time.sleep(0.25)
    assert client.http.get(short).status_code == 404
    assert client.http.get(lasting).status_code == 200


@pytest.mark.parametrize("name", ["x.jpg", f"{'0' * 32}-0.jpg", "..%2Fledger.sqlite3"])
def test_an_unknown_file_is_404(name: str, client: PlainClient) -> None:
    """Whatever its name looks like."""
    assert client.http.get(f"/files/{name}").status_code == 404


def test_latency_is_kept(client: PlainClient, sandbox: RunningSandbox) -> None:
    """A generation takes as long as is set."""
    sandbox.control.settings(latency=0.3)
    begin = time.monotonic()
    client.post()
    assert 0.3 <= time.monotonic() - begin < 1.5


def test_too_many_at_once_are_429(client: PlainClient, sandbox: RunningSandbox) -> None:
    """Over max_in_flight calls are refused at no cost, with Retry-After only where it is set."""
    sandbox.control.settings(max_in_flight=2, latency=0.3)
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda seed: client.post(seed=seed), range(1, 6)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    assert not any("retry-after" in answer.headers for answer in answers)
    summary = sandbox.control.summary()
    assert (summary.billed_calls, summary.refused, summary.peak_in_flight) == (2, 3, 2)


def test_the_rate_limit_holds_for_a_minute(client: PlainClient, sandbox: RunningSandbox) -> None:
    """The third call of a minute that allows two is refused with a Retry-After."""
    sandbox.control.settings(rate_limit_per_minute=2, retry_after=7)
    answers = [client.post(seed=seed) for seed in (1, 2, 3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["retry-after"] == "7"


def test_the_log_shows_calls_and_costs_and_no_urls(client: PlainClient, sandbox: RunningSandbox) -> None:
    """Pages of the newest calls, by status and time; the prompt's images are not in it."""
    client.post(headers={"X-Client-Request-Id": "first"})
    sandbox.control.inject("server_error")
    client.post(headers={"X-Client-Request-Id": "second"})

    def log(**query: str) -> list[dict[str, Any]]:
        window = {} if "start" in query else {"period": "1h"}
        body: dict[str, Any] = client.http.get("/v2/logs", params={**window, **query}).raise_for_status().json()
        pages.append(body["pagination"])
        rows: list[dict[str, Any]] = body["data"]
        return rows

    pages: list[dict[str, Any]] = []

    assert [row["client_request_id"] for row in log()] == ["second", "first"]
    assert [row["client_request_id"] for row in log(limit="1")] == ["second"]
    assert pages[-1] == {"limit": 1, "offset": 0, "total": 2, "has_more": True}
    assert [row["client_request_id"] for row in log(limit="1", offset="1")] == ["first"]
    assert pages[-1] == {"limit": 1, "offset": 1, "total": 2, "has_more": False}
    assert log(offset="2") == []
    assert pages[-1]["total"] == 2
    assert log(status="succeeded")[0]["cost"] == {"usd": 0.084, "credits": PRICE}
    assert log(status="failed")[0]["cost"]["credits"] == 0
    assert log(model="flux/kontext-pro/text-to-image") == []
    assert log(start="2020-01-01T00:00:00Z", end="2020-01-02T00:00:00Z") == []
    assert "http" not in client.http.get("/v2/logs", params={"period": "1h"}).text


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"period": "1h", "limit": "101"},
        {"start": "2020-01-01T00:00:00Z"},
        {"period": "1h", "start": "2020-01-01T00:00:00Z", "end": "2020-01-02T00:00:00Z"},
        {"period": "93d"},
    ],
)
def test_the_log_wants_one_window_of_at_most_92_days(client: PlainClient, query: dict[str, str]) -> None:
    """As the service's document says; all else is refused."""
    assert client.http.get("/v2/logs", params=query).status_code == 400


def test_models_need_no_key(sandbox: RunningSandbox) -> None:
    """The list can be asked for one model, with its price."""
    url = f"{sandbox.url}/v1/models"
    found = httpx.get(url, params={"id": MODEL, "include": "pricing"}, trust_env=False).json()["data"]
    assert [model["id"] for model in found] == [MODEL]
    assert found[0]["pricing"]["credits"] == PRICE
    assert httpx.get(url, params={"id": "flux/none"}, trust_env=False).json()["data"] == []


def test_fast_images_are_valid_unique_and_of_the_size_asked_for(client: PlainClient, sandbox: RunningSandbox) -> None:
    """They decode, differ from request to request, and stay the same for one request."""
    for output_format in ("jpeg", "png"):
        drawn = client.url(output_format=output_format)
        sandbox.control.settings(fast=True, fast_bytes=200_000)
        first = client.image(output_format=output_format)
        assert client.image(output_format=output_format) == first
        assert client.image(output_format=output_format, seed=8) != first
        assert 200_000 <= len(first) <= 201_000
        with Image.open(io.BytesIO(first)) as image:
            image.load()
            assert (image.format, image.size) == (output_format.upper(), (1392, 752))
        # What a URL shows was decided when it was made.
        assert client.http.get(drawn).content != first
        sandbox.control.settings(fast=False)
