"""Every prompt with every seed, shape and guidance, and a contact sheet of each."""

from __future__ import annotations

import io
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image
from prefect.artifacts import Artifact
from prefect.utilities.callables import parameter_schema
from support.nursery import Nursery

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display import contact_sheets
from flux_prefect.display.contact_sheets import MAX_DATA_URI, Cell, ContactSheet
from flux_prefect.errors import BatchFailed, TooManyCombinations
from flux_prefect.flows.sweep_seeds import sweep_seeds
from flux_prefect.sandbox.launching import RunningSandbox


async def read_sheet(bucket: ImageBucket, uri: str) -> Image.Image:
    """A contact sheet as it stands in the bucket."""
    content = await bucket.read_path(uri.removeprefix(f"{bucket.uri}/"))
    return Image.open(io.BytesIO(content))


@pytest.mark.usefixtures("prefect_server")
class TestFromPython:
    """The flow in a real Prefect run."""

    async def test_the_product_of_the_lists_is_published_once(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """A wider sweep pays for what is new alone; every prompt has its sheet, in the bucket and on the run's page."""
        lot = uuid4().hex
        prompts = [f"a *fox* <b>{lot}</b>", f"an owl {lot}", f"an owl {lot}"]
        narrow = await sweep_seeds(prompts, bucket, seeds=[1, 2], credentials=credentials)
        wide = await sweep_seeds(
            prompts, bucket, seeds=[1, 2], aspect_ratios=["1:1", "21:9"], guidance_scales=[], credentials=credentials
        )

        assert narrow.batch.count("published") == 4
        assert wide.batch.counts == {"unchanged": 4, "published": 4}
        assert set(wide.sheets) == set(prompts)
        assert len({*wide.sheets.values(), *narrow.sheets.values()}) == 4
        assert sandbox.control.summary().billed_calls == 8
        sheet = await read_sheet(bucket, wide.sheets[prompts[0]])
        assert sheet.width < sheet.height  # two seeds wide, two shapes high
        key = wide.sheets[prompts[0]].rpartition("/")[2][:12]
        artifact = await Artifact.aget(f"flux-contact-sheet-{key}")
        assert artifact is not None
        assert isinstance(artifact.data, str)
        assert artifact.data.startswith(rf"a \*fox\* \<b\>{lot}\<\/b\>")
        assert "](data:image/jpeg;base64," in artifact.data
        assert len(artifact.data) < MAX_DATA_URI + 5000

    async def test_a_failed_image_leaves_its_place_empty(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """The run is Failed with the batch's reason, and the sheet is there with the others."""
        sandbox.control.inject("moderation", times=1)
        with pytest.raises(BatchFailed):
            await sweep_seeds([f"a fox {uuid4().hex}"], bucket, seeds=[1, 2], credentials=credentials)

        objects = bucket.get_client().list_objects_v2(
            Bucket=bucket.bucket_name, Prefix=f"{bucket.prefix}/contact-sheets/"
        )
        assert objects["KeyCount"] == 1

    async def test_a_failing_sheet_fails_nothing_that_is_paid(
        self,
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The other sheets are made, and the log says which is missing and why."""
        broken, whole = f"a broken fox {uuid4().hex}", f"a whole fox {uuid4().hex}"
        publish = contact_sheets.publish_contact_sheet

        async def fail_once(prompt: str, *args: Any, **options: Any) -> str:
            if prompt == broken:
                raise OSError("no space left")
            return await publish(prompt, *args, **options)

        monkeypatch.setattr(contact_sheets, "publish_contact_sheet", fail_once)
        report = await sweep_seeds([broken, whole], bucket, seeds=[1], credentials=credentials)

        assert report.batch.counts == {"published": 2}
        assert set(report.sheets) == {whole}
        assert "no space left. Its images are published." in caplog.text

    async def test_too_many_are_refused_with_their_number(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """And with what they would have cost; nothing is sent."""
        with pytest.raises(TooManyCombinations, match=r"make 200 images, at most [\d,]+ credits .* max_combinations"):
            await sweep_seeds(
                ["a", "b"],
                bucket,
                seeds=list(range(1, 51)),
                guidance_scales=[2, 4],
                max_combinations=199,
                credentials=credentials,
            )
        assert sandbox.control.summary().calls == 0


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (640, 480)) -> bytes:
    """An image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_sheet_is_filled_from_left_to_right() -> None:
    """An image keeps its shape, and one that is missing leaves its place."""
    sheet = ContactSheet("three of four", cells=4, columns=2)
    for cell in (Cell("red", jpeg((255, 0, 0))), Cell("none", None), Cell("blue", jpeg((0, 0, 255), (200, 900)))):
        sheet.add(cell)
    with Image.open(io.BytesIO(sheet.to_jpeg())) as image:
        red, none, blue, paper = (image.getpixel(place) for place in ((136, 162), (400, 162), (136, 444), (400, 444)))

    assert isinstance(red, tuple)
    assert isinstance(blue, tuple)
    assert red[0] > 200 > red[2]
    assert blue[2] > 200 > blue[0]
    assert none == pytest.approx((226, 226, 222), abs=4)
    assert paper == pytest.approx((250, 250, 248), abs=4)


def test_a_preview_of_a_thousand_noisy_images_is_small() -> None:
    """It is made smaller until it fits."""
    sheet = ContactSheet("noise " * 1000, cells=1000, columns=100)
    buffer = io.BytesIO()
    Image.effect_noise((256, 256), 100).convert("RGB").save(buffer, "PNG")
    for number in range(1000):
        sheet.add(Cell(f"seed {number}", buffer.getvalue()))

    assert 1000 < len(sheet.to_data_uri()) <= MAX_DATA_URI


def test_the_form_has_help_and_bounds() -> None:
    """What the UI builds its form from."""
    schema = parameter_schema(sweep_seeds)
    fields = schema.properties

    assert schema.required == ["prompts", "bucket"]
    assert all(field.get("description") for field in fields.values())
    assert fields["aspect_ratios"]["items"]["enum"][0] == "21:9"
    assert fields["seeds"]["items"] == {"maximum": 4294967295, "minimum": 1, "type": "integer"}
    assert fields["guidance_scales"]["items"]["maximum"] == 20


def test_from_a_shell(sandbox: RunningSandbox, bucket: ImageBucket, nursery: Nursery) -> None:
    """Ranges of seeds are written with a hyphen."""
    options = ("--seeds", "7", "20-22", "--aspect-ratios", "1:1", "3:2", "--dry-run")
    ended = nursery.run("sweep", "a fox", "--bucket", bucket.uri, *options)

    assert ended.returncode == 0, ended.stderr
    assert "Completed: dry run: 8 rows: 8 to generate" in ended.stdout
    assert sandbox.control.summary().calls == 0
