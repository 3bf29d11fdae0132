"""The flow of one request: from Python and from a shell."""

from __future__ import annotations

from io import BytesIO
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image
from prefect.utilities.callables import parameter_schema
from support.nursery import Nursery

from flux_prefect.api.models import ImageRequest
from flux_prefect.api.registry import FluxModel
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import RequestRefused
from flux_prefect.flows.publish_image import publish_image
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.sandbox.settings import PRICES


@pytest.mark.usefixtures("prefect_server")
class TestFromPython:
    """The flow in a real Prefect run."""

    async def test_returns_the_published_images(
        self, request_: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """All images of the request, in the service's order."""
        images = await publish_image(request_.model_copy(update={"num_images": 3}), bucket, credentials)

        assert [image.index for image in images] == [0, 1, 2]
        assert {image.seed for image in images} == {7}

    @pytest.mark.parametrize(
        ("model", "fields", "size", "output_format"),
        [
            ("flux/kontext-pro/text-to-image", {"aspect_ratio": "3:4", "output_format": "png"}, (880, 1184), "png"),
            ("flux-pro/v1.1", {"image_size": "portrait_4_3", "output_format": "png"}, (768, 1024), "png"),
            ("flux/dev", {"image_size": "640x512", "num_inference_steps": 12}, (640, 512), "jpeg"),
            ("flux/srpo", {"image_size": "square", "acceleration": "high"}, (512, 512), "jpeg"),
            ("blackforestlabs/flux-2", {"image_size": "512x1024", "output_format": "webp"}, (512, 1024), "webp"),
        ],
    )
    async def test_a_text_model_of_each_family(
        self,
        model: FluxModel,
        fields: dict[str, Any],
        size: tuple[int, int],
        output_format: str,
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """Published as asked for, paid for once at the model's price; the second run finds it."""
        request = ImageRequest(prompt=uuid4().hex, seed=7, **fields | {"model": model})

        (image,) = await publish_image(request, bucket, credentials)
        (again,) = await publish_image(request, bucket, credentials)

        assert again.key == image.key
        with Image.open(BytesIO(await bucket.read_image(image))) as decoded:
            assert (decoded.size, decoded.format) == (size, output_format.upper())
        (call,) = sandbox.control.ledger().rows
        assert (call.model, call.credits) == (model, PRICES.get(model, 168_000))

    async def test_a_missing_seed_is_drawn_and_recorded(
        self, request_: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """Two runs draw two seeds; each is the one that the service was asked for."""
        unseeded = request_.model_copy(update={"seed": None})
        drawn = [(await publish_image(unseeded, bucket, credentials))[0].seed for _ in range(2)]

        assert len(set(drawn)) == 2
        assert {row.seed for row in sandbox.control.ledger().rows} == set(drawn)

    async def test_a_refusal_fails_the_run_with_its_reason(
        self, request_: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """The state says what happened and what it cost."""
        sandbox.control.inject("moderation", times=1)
        state = await publish_image(request_, bucket, credentials, return_state=True)

        assert state.is_failed()
        assert str(state.message).endswith("Cost of this run: 0 credits ($0.00).")
        with pytest.raises(RequestRefused):
            await state.aresult()


def test_the_form_offers_what_the_service_offers() -> None:
    """Drop-downs and bounds come from the request model."""
    request = parameter_schema(publish_image).definitions["ImageRequest"]["properties"]

    assert request["output_format"]["anyOf"][0]["enum"] == ["jpeg", "png", "webp"]
    assert request["num_images"]["maximum"] == 4
    assert request["safety_tolerance"]["anyOf"][0]["enum"] == list("123456")


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["a fox", "--seed", "3", "--aspect-ratio", "1:1"], 0, "s3://images/"),
        (["a fox", "--seed", "0"], 2, "seed is '0'"),
        (["a fox", "--num-images", "5"], 2, "num_images is '5'"),
        (["", "--seed", "3"], 2, "prompt is ''"),
        (["x" * 4001], 2, "at most 4000 characters"),
    ],
    ids=["good", "seed-0", "5-images", "no-prompt", "4001-characters"],
)
def test_from_a_shell(
    arguments: list[str],
    status: int,
    expected: str,
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    nursery: Nursery,
) -> None:
    """The exit status and what is on the screen; bad input never reaches the service."""
    ended = nursery.run("publish", "image", *arguments, "--bucket", bucket.uri)

    assert ended.returncode == status, ended.stderr
    assert expected in (ended.stdout if status == 0 else ended.stderr)
    if status == 0:  # stdout has nothing but the address, for scripts
        assert len(ended.stdout.split()) == 1
        assert "Cost of this run: 168,000 credits ($0.08)" in ended.stderr
    assert sandbox.control.summary().calls == (1 if status == 0 else 0)
