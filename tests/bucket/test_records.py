"""The JSON records of images: apart from the images, and never public with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from support import published_before
from support.images import make_file

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage, PublishingRun
from flux_prefect.host.spool import ImageFile
from flux_prefect.manifest.inspection import inspect_published

RUN = PublishingRun(flow_run_id="run-1", flow_run_name="nightly")


@pytest.fixture
def file(tmp_path: Path, request_: ImageRequest) -> ImageFile:
    """An image that is not in the bucket yet."""
    return make_file(tmp_path, request_)


def changed(bucket: ImageBucket, **fields: Any) -> ImageBucket:
    """The bucket with other fields."""
    values = {name: getattr(bucket, name) for name in ImageBucket.model_fields}
    return ImageBucket.model_validate({**values, **fields})


async def find_before(bucket: ImageBucket) -> PublishedImage:
    """The image of 0.1.0, restored in the bucket."""
    published_before.restore(bucket, published_before.ENDPOINT)
    found = await bucket.find(published_before.REQUEST, published_before.FINGERPRINT, 0)
    assert found is not None
    return found


async def test_a_record_lies_below_its_own_prefix(bucket: ImageBucket, file: ImageFile) -> None:
    """No cache may keep it, whatever images are published with. Below it, the key is the image's own."""
    image = await bucket.publish(file, RUN)

    name = image.key.removeprefix(f"{bucket.prefix}/")
    assert image.sidecar_key == f"{bucket.prefix}/records/{name}.{image.sha256[:16]}.json"
    assert await bucket.list_keys(most=9) == frozenset({image.key, image.sidecar_key})
    assert bucket.get_client().head_object(Bucket="images", Key=image.sidecar_key)["CacheControl"] == "no-store"
    record = await bucket.read_record(image)
    assert record is not None
    assert record["run"] == {"flow_run_id": "run-1", "flow_run_name": "nightly"}


async def test_records_are_found_after_their_prefix_has_changed(bucket: ImageBucket, file: ImageFile) -> None:
    """The image names the prefix that it was published with, also one that no header could hold as it is."""
    image = await changed(bucket, records_prefix="/Büro/Akten/").publish(file, RUN)
    found = await bucket.find(file.generation.request, file.generation.fingerprint, 0)

    assert found is not None
    assert found.sidecar_key == image.sidecar_key
    assert found.sidecar_key.startswith(f"{bucket.prefix}/Büro/Akten/")
    assert await bucket.read_record(found) is not None


async def test_an_image_of_0_1_0_has_its_record_beside_it(bucket: ImageBucket) -> None:
    """It is found by one HEAD, read, and in order for an audit."""
    image = await find_before(bucket)

    assert image.sidecar_key == f"{image.key}.{image.sha256[:16]}.json"
    record = await bucket.read_record(image)
    assert record is not None
    assert record["credits_used"] == 168_000
    assert (await inspect_published(bucket, image, deep=True)).finding == "ok"


async def test_records_of_0_1_0_may_be_moved(bucket: ImageBucket) -> None:
    """To where they would be published today, by their names. They are read there, and the audit passes."""
    image = await find_before(bucket)
    record = await bucket.read_record(image)
    beside, name = image.sidecar_key, image.sidecar_key.removeprefix(f"{bucket.prefix}/")
    bucket.objects.copy(beside, f"{bucket.prefix}/records/{name}")
    bucket.objects.delete(beside)

    assert await bucket.read_record(image) == record
    assert (await inspect_published(bucket, image, deep=False)).finding == "ok"


async def test_a_lost_record_of_0_1_0_is_restored_apart(bucket: ImageBucket, tmp_path: Path) -> None:
    """Publishing the same bytes again writes the record alone, not beside the image."""
    image = await find_before(bucket)
    bucket.objects.delete(image.sidecar_key)
    assert await bucket.read_record(image) is None
    assert (await inspect_published(bucket, image, deep=False)).finding == "missing_sidecar"

    file = make_file(tmp_path, published_before.REQUEST)
    content = await bucket.read_image(image)
    file.path.write_bytes(content)
    generation = file.generation.model_copy(
        update={"endpoint": published_before.ENDPOINT, "fingerprint": published_before.FINGERPRINT}
    )
    again = file.model_copy(update={"sha256": image.sha256, "size": len(content), "generation": generation})

    assert not (await bucket.publish(again, RUN)).created
    assert (await inspect_published(bucket, image, deep=False)).finding == "ok"
    assert bucket.objects.head(image.sidecar_key) is None


async def test_the_policy_of_the_docs_opens_images_alone(bucket: ImageBucket, file: ImageFile) -> None:
    """Anybody reads an image by its address. Its record and the manifests stay closed."""
    page = (Path(__file__).parents[2] / "deployments" / "docs" / "s3-servers.md").read_text()
    policy = page.partition("```json\n")[2].partition("```")[0]
    shop = changed(bucket, key_template="images/{fingerprint}-{index}.{extension}")
    client = bucket.get_client()
    client.put_bucket_policy(Bucket="images", Policy=policy.replace("your-bucket/shop/", f"images/{bucket.prefix}/"))
    try:
        image = await shop.publish(file, RUN)
        await shop.write_path("manifests/latest.jsonl", b"{}\n")
        async with httpx.AsyncClient(base_url=f"{bucket.endpoint_url}/images/") as anybody:
            answers = [
                (await anybody.get(key)).status_code
                for key in (image.key, image.sidecar_key, f"{bucket.prefix}/manifests/latest.jsonl")
            ]
    finally:
        client.delete_bucket_policy(Bucket="images")

    assert json.loads(policy)["Statement"][0]["Action"] == "s3:GetObject"
    assert answers == [200, 403, 403]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"records_prefix": ""}, "folder of their own"),
        ({"records_prefix": "/"}, "folder of their own"),
        ({"records_prefix": "a/../b"}, "dot segment"),
        ({"key_template": "records/{fingerprint}-{index}.jpg"}, "one without images"),
        ({"key_template": "records/a/{fingerprint}-{index}.jpg"}, "one without images"),
        (
            {"key_template": "images/{fingerprint}-{index}.jpg", "records_prefix": "images/records"},
            "one without images",
        ),
    ],
)
def test_records_among_images_are_refused(fields: dict[str, str], message: str) -> None:
    """A policy could not open one without the other."""
    with pytest.raises(ValidationError, match=message):
        ImageBucket.model_validate({"bucket_name": "images", **fields})


def test_records_beside_a_folder_of_images_are_fine() -> None:
    """Names that only begin alike are no folder in another."""
    for template in ("images/{fingerprint}-{index}.jpg", "records-{fingerprint}-{index}.jpg"):
        assert ImageBucket(bucket_name="images", key_template=template).records_prefix == "records"
