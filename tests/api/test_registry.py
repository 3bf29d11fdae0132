"""Every model's entry against the service's own document of it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from pydantic import ValidationError

from flux_prefect.api.models import MAX_SEED, ImageRequest
from flux_prefect.api.registry import (
    MODELS,
    Choice,
    EditModel,
    FieldSpec,
    Flag,
    Loras,
    Model,
    Number,
    Size,
    TextToImageModel,
)

DOCUMENTS = Path(__file__).parents[1] / "data" / "models"
REQUESTS_A_MODEL = int(os.environ.get("FLUX_PREFECT_REQUESTS_A_MODEL", "250"))
"""5,000 make the hundred thousand of `make test-all`."""

NOT_OFFERED = {
    "sync_mode": "decides how the image is delivered, not what it shows",
    "raw": "the document allows only its default, false",
}


def _schema(path: Path) -> dict[str, Any]:
    operation = json.loads(path.read_text())["paths"]["/v1/images/generations"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert isinstance(schema, dict)
    return schema


SCHEMAS = {
    schema["properties"]["model"]["enum"][0]: schema for schema in map(_schema, sorted(DOCUMENTS.glob("*.json")))
}
ALL = pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.id)


def _documented(name: str, field: dict[str, Any]) -> FieldSpec:
    """The entry that a document's field calls for."""
    if name == "image_size":
        pixels, presets = field["anyOf"]
        assert "multiple of 32" in pixels["description"]
        width, height = pixels["properties"]["width"], pixels["properties"]["height"]
        assert {key: width[key] for key in ("minimum", "maximum")} == {
            key: height[key] for key in ("minimum", "maximum")
        }
        return Size(width["minimum"], width["maximum"], field["default"], 32, tuple(presets["enum"]))
    if name == "loras":
        scale = field["items"]["properties"]["scale"]
        assert field["items"]["required"] == ["path"]
        return Loras(field["maxItems"], Number(scale["minimum"], scale["maximum"]))
    match field["type"]:
        case "string":
            return Choice(tuple(field["enum"]), field.get("default"))
        case "boolean":
            return Flag(field["default"])
        case kind:
            return Number(field.get("minimum"), field.get("maximum"), field.get("default"), kind == "integer")


def test_there_is_an_entry_a_document_and_no_other() -> None:
    """A new document is a failing test until it has its entry and its name in the types."""
    assert set(MODELS) == set(SCHEMAS) == {*get_args(TextToImageModel), *get_args(EditModel)}
    assert {model.id for model in MODELS.values() if model.references} == set(get_args(EditModel))


@ALL
def test_an_entry_is_its_document(model: Model) -> None:
    """The same fields, with the same bounds, defaults and values."""
    properties = dict(SCHEMAS[model.id]["properties"])
    prompt = properties.pop("prompt")
    assert (prompt["type"], prompt["maxLength"]) == ("string", 4000)
    del properties["model"]
    if model.references is not None:
        _check_references(model, properties.pop(model.references.parameter))
    for name in NOT_OFFERED:
        properties.pop(name, None)

    assert dict(model.fields) == {name: _documented(name, field) for name, field in properties.items()}


def _check_references(model: Model, field: dict[str, Any]) -> None:
    references = model.references
    assert references is not None
    assert references.parameter in SCHEMAS[model.id]["required"]
    options = field.get("anyOf", [field])
    lists = [option for option in options if option["type"] == "array"]
    assert references.listed == (options == lists)
    assert references.most == (lists[0]["maxItems"] if lists else 1)


def _values(name: str, field: dict[str, Any]) -> list[Any]:
    """Values at, around and beyond the bounds of a field."""
    if name == "image_size":
        width = field["anyOf"][0]["properties"]["width"]
        low, high = width["minimum"], width["maximum"]
        sizes = [(low, high), (high, low), (low - 32, high), (low, high + 32), (low + 1, high), (low + 32, high - 32)]
        return ["square", "landscape_16_9", "huge", *({"width": w, "height": h} for w, h in sizes)]
    if name == "loras":
        return [[{"path": "owner/name", "scale": scale} for scale in scales] for scales in ((), (0,), (4, 2), (5,))] + [
            [{"path": "owner/name"}] * 4
        ]
    if "enum" in field:
        return [*field["enum"], "other"]
    if field["type"] == "boolean":
        return [True, False]
    low, high = field.get("minimum", -1), field.get("maximum", 60)
    return [low, high, (low + high) // 2, low - 1, high + 1, low + 0.5, MAX_SEED, MAX_SEED + 1]


def _body(model: Model, random_: random.Random) -> dict[str, Any]:
    properties = SCHEMAS[model.id]["properties"]
    body: dict[str, Any] = {
        "model": model.id,
        "prompt": random_.choice(["a lighthouse", "x", "x" * 4000, "x" * 4001, "", "  "]),
    }
    names = [name for name in properties if name not in {"model", "prompt", "image_url", "image_urls"}]
    for name in random_.sample(names, random_.randint(0, min(3, len(names)))):
        body[name] = random_.choice(_values(name, properties[name]))
    return body


def _excused(body: dict[str, Any]) -> str | None:
    """Why a request is refused here that the document would take."""
    size, count, seed = body.get("image_size"), body.get("num_images", 1), body.get("seed", 1)
    reasons = {
        "a blank prompt describes nothing": not body["prompt"].strip(),
        "the samples' seeds fit 32 bits": seed > MAX_SEED,
        "half an image can't be published": count != int(count),
        "the multiple of 32 stands in the document's text": isinstance(size, dict)
        and any(pixels % 32 for pixels in size.values()),
        **{reason: name in body for name, reason in NOT_OFFERED.items()},
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


@ALL
def test_requests_are_taken_as_the_document_takes_them(model: Model) -> None:
    """What is taken here is valid to the document, and what is refused here would be refused, or is excused."""
    schema = {**SCHEMAS[model.id], "required": ["model", "prompt"]}  # references have tests of their own
    document = Draft202012Validator(schema)
    random_ = random.Random(model.id)  # noqa: S311 - the same requests in every run
    taken = 0
    for _ in range(REQUESTS_A_MODEL):
        body = _body(model, random_)
        try:
            request = ImageRequest.model_validate(body)
        except ValidationError:
            assert not document.is_valid(body) or _excused(body) is not None, body
        else:
            taken += 1
            assert document.is_valid(request.payload()), (body, request.payload())
            assert {name: value for name, value in request.payload().items() if name in body} == body
    assert 0 < taken < REQUESTS_A_MODEL


@ALL
def test_every_default_is_sent(model: Model) -> None:
    """A request of a prompt alone spells out the model's own defaults."""
    assert ImageRequest(prompt="a lighthouse", model=model.id).payload() == {
        "model": model.id,
        "prompt": "a lighthouse",
        **{
            name: field["default"]
            for name, field in SCHEMAS[model.id]["properties"].items()
            if "default" in field and name not in NOT_OFFERED
        },
    }


def test_the_page_of_models_lists_each() -> None:
    """With the bounds of its size."""
    page = (Path(__file__).parents[2] / "deployments" / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(rows) == list(MODELS)
    for model in MODELS.values():
        size, formats = model.fields.get("image_size"), model.fields.get("output_format")
        if isinstance(size, Size):
            assert f"{size.minimum} to {size.maximum} px" in rows[model.id]
        if isinstance(formats, Choice):
            assert f"| {', '.join(formats.values)} |" in rows[model.id]


def test_a_field_of_another_model_is_refused_by_name_with_those_that_take_it() -> None:
    """The remedy stands in the message."""
    with pytest.raises(ValidationError) as refused:
        ImageRequest(prompt="a lighthouse", strength=0.5)

    (error,) = refused.value.errors()
    assert error["loc"] == ("strength",)
    assert error["msg"] == (
        "is not a field of flux/kontext-max/text-to-image; flux/dev/image-to-image, flux/srpo/image-to-image take it"
    )


def test_a_model_that_is_not_listed_needs_an_explicit_word() -> None:
    """A misspelt id is refused with the nearest ones; with extra_fields it is sent as it is, with an identity."""
    with pytest.raises(ValidationError, match=r"did you mean .*flux/kontext-max/text-to-image"):
        ImageRequest(prompt="a lighthouse", model="flux/kontex-max/text-to-image")

    request = ImageRequest(prompt="a lighthouse", seed=7, model="flux/next", extra_fields={"style": "ink"})
    plain = ImageRequest(prompt="a lighthouse", seed=7, model="flux/next", extra_fields={})

    assert request.payload() == {"model": "flux/next", "prompt": "a lighthouse", "seed": 7, "style": "ink"}
    endpoint = "https://api.aimlapi.com"
    assert len({request.fingerprint(endpoint), plain.fingerprint(endpoint)}) == 2
    with pytest.raises(ValidationError, match="must not hold seed"):
        ImageRequest(prompt="a lighthouse", model="flux/next", extra_fields={"seed": 8})


@pytest.mark.parametrize("size", ["1024x768", "1024 X 768", "1024*768", {"width": 1024, "height": 768}])
def test_a_size_is_written_as_people_write_it(size: Any) -> None:
    """One size has one identity, however it is written."""
    request = ImageRequest(prompt="a lighthouse", seed=7, model="flux/dev", image_size=size)

    assert request.payload()["image_size"] == {"width": 1024, "height": 768}
    assert request.shape == "1024x768"
