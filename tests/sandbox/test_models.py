"""The sandbox as each of the service's models."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from flux_prefect.api.registry import MODELS, Model
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.sandbox.settings import PRICES

from .plain_client import PlainClient

ALL = pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.id)
EDIT = "flux/kontext-max/image-to-image"


def _png(colour: str, size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _decode(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def _references(model: Model) -> dict[str, Any]:
    if model.references is None:
        return {}
    uri = _data_uri(_png("red"))
    return {model.references.parameter: [uri] if model.references.listed else uri}


@ALL
def test_every_model_answers_with_its_format_and_size_at_its_price(
    model: Model, client: PlainClient, sandbox: RunningSandbox
) -> None:
    """The image is what the answer announces, in each format that the document names."""
    sandbox.control.settings(fast=True, fast_bytes=1_000)
    formats = getattr(model.fields.get("output_format"), "values", ("jpeg",))
    for output_format in formats:
        chosen: dict[str, Any] = {"output_format": output_format} if "output_format" in model.fields else {}
        answer = client.post(model=model.id, **chosen, **_references(model)).raise_for_status().json()
        (announced,) = answer["images"]
        image = Image.open(io.BytesIO(client.http.get(announced["url"]).content))
        image.load()
        assert (image.format, announced["content_type"]) == (output_format.upper(), f"image/{output_format}")
        assert image.size == (announced["width"], announced["height"])
        assert answer["meta"]["usage"]["credits_used"] == PRICES.get(model.id, 168_000)
    found = client.http.get("/v1/models", params={"id": model.id, "include": "pricing"}).json()["data"]
    assert found[0]["pricing"]["credits"] == PRICES.get(model.id, 168_000)
    assert {call.model for call in sandbox.control.ledger().rows} == {model.id}


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"model": "flux/dev", "image_size": {"width": 640, "height": 1024}}, (640, 1024)),
        ({"model": "flux/dev", "image_size": "portrait_16_9"}, (576, 1024)),
        ({"model": "flux/dev"}, (1024, 768)),
        ({"model": "flux-pro/v1.1-ultra"}, (2752, 1536)),
        ({"model": EDIT, "image_url": _data_uri(_png("red", (400, 300)))}, (1184, 880)),
        (
            {
                "model": "blackforestlabs/flux-2-edit",
                "image_urls": [_data_uri(_png("red"))],
                "image_size": {"width": 512, "height": 1024},
            },
            (512, 1024),
        ),
    ],
)
def test_sizes(fields: dict[str, Any], size: tuple[int, int], client: PlainClient) -> None:
    """As asked for; the ultra model's own; an edit without a size has its reference's shape."""
    (announced,) = client.post(**fields).raise_for_status().json()["images"]
    assert (announced["width"], announced["height"]) == size


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": {"width": 480, "height": 640}, "model": "flux/dev"},
        {"image_size": "huge", "model": "flux/dev"},
        {"num_inference_steps": 51, "model": "flux/dev"},
        {"output_format": "webp", "model": "flux-pro"},
        {"safety_tolerance": "6", "model": "blackforestlabs/flux-2-max"},
        {"loras": [{"path": "a/b"}] * 4, "model": "blackforestlabs/flux-2-lora"},
        {"image_url": 7, "model": EDIT},
        {"image_url": [_data_uri(_png("red"))] * 5, "model": EDIT},
        {"image_urls": [], "model": "blackforestlabs/flux-2-edit"},
        {"image_url": [_data_uri(_png("red"))], "model": "flux/dev/image-to-image"},
        {"strength": 1.5, "image_url": _data_uri(_png("red")), "model": "flux/srpo/image-to-image"},
    ],
)
def test_each_models_bounds_are_its_own(fields: dict[str, Any], client: PlainClient, sandbox: RunningSandbox) -> None:
    """With the field's name, and at no cost."""
    answer = client.post(**fields)
    assert answer.status_code == 400
    assert next(iter(fields)) in answer.json()["message"]
    assert sandbox.control.summary().billed_calls == 0


def test_an_edit_needs_a_reference_and_other_models_ignore_it(client: PlainClient) -> None:
    """Fields that a model does not have are ignored, as the documents allow."""
    assert client.post(model=EDIT).status_code == 400
    assert client.post(image_url="https://nowhere.invalid/x.png", strength=7).status_code == 200


def test_an_edit_shows_its_references_and_its_prompt(client: PlainClient) -> None:
    """Red left, blue right, before the scene of the prompt; the same request gives the same bytes."""
    both = [_data_uri(_png("red")), _data_uri(_png("blue"))]
    fields = {"model": EDIT, "image_url": both, "prompt": "a mountain", "output_format": "png"}
    content = client.image(**fields)
    image = _decode(content)
    left = image.getpixel((round(image.width * 0.3), round(image.height * 0.4)))
    right = image.getpixel((round(image.width * 0.7), round(image.height * 0.4)))
    assert isinstance(left, tuple)
    assert isinstance(right, tuple)
    assert left[0] > right[0] + 150
    assert right[2] > left[2] + 150
    assert client.image(**fields) == content
    other = _decode(client.image(**fields | {"prompt": "the sea"}))
    corner = (0, 0, image.width // 20, image.height)
    assert other.crop(corner).tobytes() != image.crop(corner).tobytes()


def test_a_reference_is_its_bytes_wherever_they_are(client: PlainClient, sandbox: RunningSandbox) -> None:
    """By data: URI or http, the same edit; the address is kept nowhere."""
    url = client.url(prompt="a product")
    content = client.http.get(url).content
    fields = {"model": EDIT, "output_format": "png"}
    edited = client.image(image_url=f"{url}?X-Amz-Signature=abc", **fields)
    inline = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"

    assert client.image(image_url=inline, **fields) == edited
    last = sandbox.control.ledger().rows[-1]
    assert len(last.references) == 1
    files = [path.read_bytes() for path in sandbox.data.rglob("*") if path.is_file()]
    assert not any(b"X-Amz-Signature" in content for content in files)


@pytest.mark.parametrize(
    "uri",
    [
        "{sandbox}/files/gone.png",
        "http://127.0.0.1:9/x.png",
        "http://[bad/x.png",
        "ftp://127.0.0.1/x.png",
        "file:///etc/passwd",
        "nonsense",
        "data:image/png;base64,!!!",
        "data:text/plain,hello",
        _data_uri(_png("red")[:40]),
    ],
)
def test_a_reference_that_is_no_image_costs_nothing(uri: str, client: PlainClient, sandbox: RunningSandbox) -> None:
    """Refused with 400 before anything is billed, without the address in the answer."""
    wanted = uri.format(sandbox=sandbox.url)
    answer = client.post(model=EDIT, image_url=wanted)
    assert answer.status_code == 400
    assert wanted not in answer.text
    assert sandbox.control.summary().billed_calls == 0


def test_a_withdrawn_model_is_listed_and_refused(client: PlainClient, sandbox: RunningSandbox) -> None:
    """404 at no cost; a deprecated one still serves. The list needs no key."""
    listed = [
        {"id": "flux/dev", "status": "withdrawn", "replaced_by": "flux-pro"},
        {"id": "flux-pro", "status": "deprecated", "replaced_by": None},
    ]
    sandbox.control.settings(deprecations=listed)

    assert httpx.get(f"{sandbox.url}/v1/models/deprecations", trust_env=False).json()["data"] == listed
    assert client.post(model="flux/dev").status_code == 404
    assert client.post(model="flux-pro").status_code == 200
    assert sandbox.control.summary().billed_calls == 1


@pytest.mark.parametrize("fault", ["wrong_type", "bomb", "truncated_image", "corrupt_download"])
def test_faults_strike_webp_as_well(fault: str, client: PlainClient, sandbox: RunningSandbox) -> None:
    """No fault delivers the image whole."""
    url = client.url(model="blackforestlabs/flux-2", output_format="webp")
    whole = client.http.get(url).content
    sandbox.control.inject(fault)

    struck = client.http.get(url)

    assert struck.status_code == httpx.codes.OK
    assert struck.content != whole
    if fault == "wrong_type":
        assert struck.headers["content-type"] == "image/png"
    if fault == "bomb":
        with pytest.raises(Image.DecompressionBombError, match=str(16_383**2)):
            Image.open(io.BytesIO(struck.content))
