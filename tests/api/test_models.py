from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flux_prefect.api.models import (
    MAX_SEED,
    Generation,
    ImageRequest,
    normalize_endpoint,
    parse_generation,
)
from flux_prefect.errors import Billed, EmptyGeneration, InvalidResponse, ServiceError

ENDPOINT = "https://api.aimlapi.com"
URL = "https://cdn.aimlapi.com/squirrel/files/monkey/one.jpg"


# Requests


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x"},
        {"prompt": "x" * 4000},
        {"prompt": "🗼" * 4000},
        {"seed": 1},
        {"seed": MAX_SEED},
        {"guidance_scale": 1},
        {"guidance_scale": 20},
        {"num_images": 1},
        {"num_images": 4},
        {"safety_tolerance": "6"},
        {"output_format": "png"},
        {"aspect_ratio": "9:21"},
        {"model": "flux/kontext-pro/text-to-image"},
    ],
)
def test_values_at_their_bounds_are_taken(fields: dict[str, Any]) -> None:
    """Each bound belongs to its range."""
    request = ImageRequest.model_validate({"prompt": "a lighthouse", **fields})
    assert request.model_dump(include=set(fields)) == fields


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": " \n\t"},
        {"prompt": "x" * 4001},
        {"prompt": "\ud800"},
        {"seed": 0},
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"seed": 1.5},
        {"guidance_scale": 0.99},
        {"guidance_scale": 20.01},
        {"guidance_scale": float("nan")},
        {"guidance_scale": float("inf")},
        {"num_images": 0},
        {"num_images": 5},
        {"safety_tolerance": "0"},
        {"safety_tolerance": "7"},
        {"safety_tolerance": 2},
        {"output_format": "webp"},
        {"aspect_ratio": "5:4"},
        {"model": "flux/devv"},
        {"image_size": "square"},
        {"strength": 0.5},
        {"sead": 7},
    ],
)
def test_a_wrong_field_is_refused_by_its_name(fields: dict[str, Any]) -> None:
    """Nothing that the service would refuse, or silently ignore, gets as far as costing money."""
    with pytest.raises(ValidationError) as refused:
        ImageRequest.model_validate({"prompt": "a lighthouse", **fields})
    assert {error["loc"][0] for error in refused.value.errors()} == set(fields)


def test_the_body_sent_spells_out_every_default(lighthouse: ImageRequest) -> None:
    """A change of the service's defaults changes no image; what is not asked for is not sent."""
    assert lighthouse.payload() == {
        "model": "flux/kontext-max/text-to-image",
        "prompt": "a lighthouse",
        "seed": 7,
        "aspect_ratio": "16:9",
        "output_format": "jpeg",
        "safety_tolerance": "2",
        "num_images": 1,
    }


@pytest.mark.parametrize(
    ("request_", "label"),
    [
        (ImageRequest(prompt="a lighthouse", seed=7), "a lighthouse · seed 7"),
        (ImageRequest(prompt="a\n  lighthouse"), "a lighthouse"),
        (ImageRequest(prompt="x" * 48), "x" * 48),
        (ImageRequest(prompt="x" * 49), "x" * 47 + "…"),
        (ImageRequest(prompt="x" * 46 + " yy", seed=1), "x" * 46 + "… · seed 1"),
    ],
)
def test_the_label_is_one_short_line(request_: ImageRequest, label: str) -> None:
    """White space is folded and a long prompt cut, the seed stays."""
    assert request_.label == label


# Fingerprints


def test_the_fingerprint_never_changes_between_releases(lighthouse: ImageRequest) -> None:
    """Published keys stay findable: this value stands in people's buckets."""
    assert lighthouse.fingerprint(ENDPOINT) == "c49bea35eb70a97143b78f893cefdd1b"


def test_the_fingerprint_can_be_made_elsewhere() -> None:
    """It is the first half of the SHA-256 of a canonical JSON text in ASCII."""
    request = ImageRequest(prompt="Leuchtturm, Ärmelkanal 🗼", seed=7, guidance_scale=3.5)
    canonical = (
        '{"endpoint":"https://api.aimlapi.com","request":{"aspect_ratio":"16:9","guidance_scale":3.5,'
        '"model":"flux/kontext-max/text-to-image","num_images":1,"output_format":"jpeg",'
        '"prompt":"Leuchtturm, \\u00c4rmelkanal \\ud83d\\uddfc","safety_tolerance":"2","seed":7},"version":1}'
    )
    assert request.fingerprint(ENDPOINT) == hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a lighthouse "},
        {"seed": 8},
        {"aspect_ratio": "1:1"},
        {"output_format": "png"},
        {"guidance_scale": 3.5},
        {"safety_tolerance": "3"},
        {"num_images": 2},
        {"model": "flux/kontext-pro/text-to-image"},
    ],
)
def test_every_field_that_changes_the_image_changes_the_fingerprint(
    lighthouse: ImageRequest, change: dict[str, Any]
) -> None:
    """No request is ever answered with another one's image."""
    assert set(change) <= set(ImageRequest.model_fields)
    changed = ImageRequest.model_validate({**lighthouse.model_dump(), **change})
    assert changed.fingerprint(ENDPOINT) != lighthouse.fingerprint(ENDPOINT)


def test_a_stand_in_never_passes_for_the_real_service(lighthouse: ImageRequest) -> None:
    """Another endpoint is another fingerprint; another way to write the same one is not."""
    assert lighthouse.fingerprint("http://127.0.0.1:8000") != lighthouse.fingerprint(ENDPOINT)
    assert lighthouse.fingerprint(" HTTPS://API.aimlapi.com/ ") == lighthouse.fingerprint(ENDPOINT)


def test_the_order_and_spelling_of_fields_does_not_matter() -> None:
    """Requests that are equal are recognised as such, however they were written down."""
    fields = {"prompt": "a lighthouse", "seed": 7, "guidance_scale": 3}
    one = ImageRequest.model_validate(fields)
    other = ImageRequest.model_validate_json(json.dumps(dict(reversed(fields.items())) | {"guidance_scale": 3.0}))
    assert one.fingerprint(ENDPOINT) == other.fingerprint(ENDPOINT)


def test_a_request_without_a_seed_has_no_fingerprint() -> None:
    """The service promises nothing of it, so nothing can be recognised."""
    with pytest.raises(ValueError, match="seed is missing"):
        ImageRequest(prompt="a lighthouse").fingerprint(ENDPOINT)


def test_an_endpoint_without_a_scheme_is_refused() -> None:
    """The message shows how to write it."""
    with pytest.raises(ValueError, match="has no scheme: write it as https://"):
        normalize_endpoint("api.aimlapi.com")


# Answers


def _parse(
    body: Any, now: datetime, request: ImageRequest | None = None, headers: dict[str, str] | None = None
) -> Generation:
    return parse_generation(
        body,
        headers or {},
        request=request or ImageRequest(prompt="a lighthouse", seed=7),
        endpoint=ENDPOINT + "/",
        client_request_id="fp-1",
        created_at=now,
    )


@pytest.mark.parametrize(
    ("body", "urls"),
    [
        ({"data": [{"url": URL}], "meta": {"usage": {"credits_used": 1}}}, [URL]),
        ({"data": [{"url": URL, "b64_json": None}], "meta": None}, [URL]),
        ({"images": [{"url": URL}], "timings": {}, "prompt": "a lighthouse"}, [URL]),
        ({"images": [{"url": URL}], "data": [{"url": URL}]}, [URL]),
        ({"images": [{"url": URL}], "data": None}, [URL]),
        ({"images": [], "data": [{"url": URL}]}, [URL]),
        ({"images": [{"url": None}], "data": [{"url": URL}]}, [URL]),
        ({"data": [{"b64_json": "aGk="}]}, ["data:image/jpeg;base64,aGk="]),
        ({"data": [{"b64_json": "aGk=", "content_type": "image/png"}]}, ["data:image/png;base64,aGk="]),
        ({"data": [{"url": "", "b64_json": "aGk="}]}, ["data:image/jpeg;base64,aGk="]),
        ({"images": [{"url": "data:image/png;base64,aGk="}]}, ["data:image/png;base64,aGk="]),
        ({"data": [{"url": f"{URL}?{i}"} for i in range(4)]}, [f"{URL}?{i}" for i in range(4)]),
        ({"data": [{"url": URL}], "something": {"new": [1]}}, [URL]),
    ],
)
def test_every_known_shape_of_answer_is_read(body: dict[str, Any], urls: list[str], now: datetime) -> None:
    """Images by URL, inline, in either list or in both."""
    assert [image.url for image in _parse(body, now).images] == urls


def test_all_that_the_service_says_is_kept(now: datetime) -> None:
    """Size, type, seed, flag, cost and ids come from where the service puts them."""
    generation = _parse(
        {
            "images": [{"url": URL, "width": 1568, "height": 672, "content_type": "image/jpeg"}],
            "timings": {},
            "seed": 1617845674,
            "has_nsfw_concepts": [True],
            "meta": {"usage": {"credits_used": 168000, "usd_spent": 0.084}},
        },
        now,
        headers={"x-inference-id": "inf-1"},
    )
    (image,) = generation.images
    assert (image.width, image.height, image.content_type, image.flagged) == (1568, 672, "image/jpeg", True)
    assert (generation.seed, generation.reported_seed) == (7, 1617845674)
    assert (generation.credits_used, generation.usd_spent) == (168000, 0.084)
    assert (generation.inference_id, generation.client_request_id) == ("inf-1", "fp-1")
    assert (generation.endpoint, generation.created_at) == (ENDPOINT, now)


@pytest.mark.parametrize(("in_headers", "in_body"), [(1, 0), (0, 1)])
def test_the_larger_of_two_reported_costs_counts(now: datetime, in_headers: int, in_body: int) -> None:
    """A service that reports 0 in one place and the cost in the other has charged the cost."""
    generation = _parse(
        {"data": [{"url": URL}], "meta": {"usage": {"credits_used": 168000 * in_body, "usd_spent": 0.084 * in_body}}},
        now,
        headers={
            "x-aimlapi-credits-used": str(168000 * in_headers),
            "x-aimlapi-usd-spent": str(0.084 * in_headers),
        },
    )
    assert (generation.credits_used, generation.usd_spent) == (168000, 0.084)


@pytest.mark.parametrize("cost", ["free", "nan", "-1", True, [], 10**400])
def test_a_cost_that_is_no_amount_is_unknown(cost: Any, now: datetime) -> None:
    """Junk in the bill loses no image."""
    body = {"data": [{"url": URL}], "meta": {"usage": {"credits_used": cost}}}
    assert _parse(body, now).credits_used is None


@pytest.mark.parametrize("flags", [None, [], [False], "True", [1], ["true"], {"0": True}])
def test_only_a_plain_true_flags_an_image(flags: Any, now: datetime) -> None:
    """Anything else says nothing."""
    assert not _parse({"images": [{"url": URL}], "has_nsfw_concepts": flags}, now).images[0].flagged


def test_flags_and_places_belong_to_their_image(now: datetime) -> None:
    """A missing image shifts neither the index nor the flag of the next."""
    body = {"images": [None, {"url": URL}], "has_nsfw_concepts": [False, True]}
    assert [(image.index, image.flagged) for image in _parse(body, now).images] == [(1, True)]


@pytest.mark.parametrize("field", ["seed", "num_images", "guidance_scale"])
def test_a_truth_value_is_no_number(field: str) -> None:
    """`"seed": true` in a table is a mistake, not seed 1."""
    with pytest.raises(ValidationError, match="must be a number, not a boolean"):
        ImageRequest.model_validate({"prompt": "a lighthouse", field: True})


def test_a_broken_list_that_was_billed_is_reported_with_its_cost(now: datetime) -> None:
    """So it is not sent again as if its cost were unknown."""
    with pytest.raises(InvalidResponse) as invalid:
        _parse({"data": "x", "meta": {"usage": {"credits_used": 168_000}}}, now)
    assert (invalid.value.billed, invalid.value.credits_used) == (Billed.YES, 168_000)


def test_a_cost_in_dollars_alone_is_reported_in_credits(now: datetime) -> None:
    """2,000,000 credits to the dollar, says the service."""
    generation = _parse({"data": [{"url": URL}], "meta": {"usage": {"usd_spent": 0.084}}}, now)
    assert generation.credits_used == pytest.approx(168_000)


def test_a_reported_seed_makes_an_unseeded_answer_repeatable(now: datetime) -> None:
    """Its fingerprint is the one of the request with that seed."""
    asked = ImageRequest(prompt="a lighthouse")
    generation = _parse({"images": [{"url": URL}], "seed": 7}, now, asked)
    assert generation.seed == 7
    assert generation.request == asked.model_copy(update={"seed": 7})
    assert generation.fingerprint == ImageRequest(prompt="a lighthouse", seed=7).fingerprint(ENDPOINT)


@pytest.mark.parametrize("seed", [None, 0, -1, MAX_SEED + 1, "7", 7.5, True])
def test_without_a_seed_the_call_itself_is_the_identity(seed: Any, now: datetime) -> None:
    """An answer that can't be asked for again never shares a fingerprint."""
    asked = ImageRequest(prompt="a lighthouse")
    generation = _parse({"images": [{"url": URL}], "seed": seed}, now, asked)
    assert generation.fingerprint == hashlib.sha256(b"call fp-1").hexdigest()[:32]


@pytest.mark.parametrize("body", [None, [], "<html>", 7, True])
def test_what_is_no_object_is_an_invalid_response(body: Any, now: datetime) -> None:
    """It says by which id to look the call up."""
    with pytest.raises(InvalidResponse, match="fp-1") as lost:
        _parse(body, now)
    assert lost.value.billed is Billed.UNKNOWN


@pytest.mark.parametrize("body", [{"data": "none"}, {"data": {"url": URL}}, {"images": [URL]}, {"images": 3}])
def test_a_list_of_something_else_is_an_invalid_response(body: Any, now: datetime) -> None:
    """Guessing at images in it would publish the wrong thing."""
    with pytest.raises(InvalidResponse):
        _parse(body, now)


@pytest.mark.parametrize(
    "body", [{}, {"data": None}, {"data": []}, {"data": [{}]}, {"images": [None]}, {"images": [{"url": ""}]}]
)
@pytest.mark.parametrize(("usage", "billed"), [(None, Billed.UNKNOWN), (0, Billed.NO), (168000, Billed.YES)])
def test_an_answer_without_an_image_says_whether_it_was_billed(
    body: dict[str, Any], usage: float | None, billed: Billed, now: datetime
) -> None:
    """By the reported cost; unknown without one."""
    headers = {} if usage is None else {"x-aimlapi-credits-used": str(usage)}
    with pytest.raises(EmptyGeneration) as empty:
        _parse(body, now, headers=headers)
    assert empty.value.billed is billed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ITEM = st.fixed_dictionaries({}, optional=dict.fromkeys(("url", "b64_json", "width", "height", "content_type"), JSON))
ANSWER = JSON | st.fixed_dictionaries(
    {},
    optional={
        "data": st.lists(ITEM | st.none(), max_size=5) | JSON,
        "images": st.lists(ITEM | st.none(), max_size=5) | JSON,
        "seed": JSON,
        "has_nsfw_concepts": JSON,
        "meta": st.fixed_dictionaries({"usage": st.dictionaries(st.just("credits_used"), JSON)}) | JSON,
    },
)


@settings(max_examples=300, deadline=None)
@example({"data": [{"url": "\ud800"}]})
@example({"data": [{"url": URL, "width": 10**400}], "seed": 10**400, "meta": {"usage": {"credits_used": 10**400}}})
@given(ANSWER)
def test_no_answer_breaks_the_reading(body: Any) -> None:
    """Any JSON is a generation that can be stored and read back, or a typed error."""
    now = datetime.fromisoformat("2026-03-01T12:00:00+00:00")
    try:
        generation = _parse(body, now)
    except ServiceError:
        return
    assert Generation.model_validate_json(generation.model_dump_json()) == generation
