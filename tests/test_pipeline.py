"""The whole path of a request, in a real flow run, against the sandbox and a real S3 server."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from pydantic import SecretStr
from support.leaks import OTHER_API_KEY
from support.s3_proxy import Answer, Passing, open_proxy

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage, PublishingRun
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import (
    BucketError,
    BucketMissing,
    ContentFlagged,
    EmptyGeneration,
    KeyOccupied,
    UnexpectedError,
)
from flux_prefect.host.spool import ImageFile, Spool
from flux_prefect.pipeline import Production, Status, produce_image
from flux_prefect.sandbox.launching import RunningSandbox

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow
async def produce(request: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials) -> Production:
    """The pipeline inside a flow run, as flows use it."""
    return await produce_image(request, bucket, credentials)


def forget_results(folder: Path) -> AbstractContextManager[Any]:
    """Run as on a machine whose Prefect has no results."""
    return temporary_settings({PREFECT_LOCAL_STORAGE_PATH: folder / uuid4().hex})


def forget_spool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run as on a machine with an empty spool."""
    monkeypatch.setenv("FLUX_PREFECT_SPOOL", str(tmp_path / uuid4().hex))


async def test_an_image_is_generated_downloaded_and_published_once(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """The second run pays nothing, fetches nothing and writes nothing."""
    first = await produce(request_, bucket, credentials)
    after_first = sandbox.control.summary()
    second = await produce(request_, bucket, credentials)

    assert [image.status for image in first.images] == [Status.PUBLISHED]
    assert [image.status for image in second.images] == [Status.UNCHANGED]
    assert first.credits_used == 168_000
    assert second.calls == []
    assert after_first.billed_calls == 1
    assert sandbox.control.summary() == after_first


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "another prompt"},
        {"seed": 8},
        {"aspect_ratio": "16:9"},
        {"output_format": "png"},
        {"guidance_scale": 3.5},
        {"safety_tolerance": "3"},
        {"num_images": 2},
        {"model": "flux/kontext-pro/text-to-image"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_any_field_that_changes_the_image_pays_for_another(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    change: dict[str, object],
) -> None:
    """The other image is published beside the first."""
    if "prompt" in change:
        change = {"prompt": f"another {request_.prompt}"}
    first = await produce(request_, bucket, credentials)
    second = await produce(request_.model_copy(update=change), bucket, credentials)

    assert sandbox.control.summary().billed_calls == 2
    assert first.images[0].image is not None
    assert second.images[0].image is not None
    assert first.images[0].image.key != second.images[0].image.key


async def test_another_api_key_finds_the_image_of_the_first(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """The key is no part of the cache: even a wrong one finds what is published, and the cached answer."""
    other = credentials.model_copy(update={"api_key": SecretStr(OTHER_API_KEY)})
    await produce(request_, bucket, credentials)
    published = await produce(request_, bucket, other)
    elsewhere = await produce(request_, bucket.model_copy(update={"prefix": f"{bucket.prefix}-2"}), other)

    assert published.images[0].status is Status.UNCHANGED
    assert elsewhere.images[0].status is Status.PUBLISHED
    assert sandbox.control.summary().calls == 1


async def test_another_endpoint_is_another_cache(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """A stand-in's image never passes for the real service's."""
    other = credentials.model_copy(update={"base_url": credentials.base_url.replace("127.0.0.1", "localhost")})
    await produce(request_, bucket, credentials)
    second = await produce(request_, bucket, other)

    assert second.images[0].status is Status.PUBLISHED
    assert sandbox.control.summary().billed_calls == 2


async def test_an_empty_machine_finds_the_image_in_the_bucket(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bucket is the cache: neither results nor spool are needed."""
    await produce(request_, bucket, credentials)
    forget_spool(monkeypatch, tmp_path)
    with forget_results(tmp_path):
        second = await produce(request_, bucket, credentials)

    assert second.images[0].status is Status.UNCHANGED
    assert sandbox.control.summary().billed_calls == 1


async def test_a_deleted_object_is_published_again_for_nothing(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """The spool still has the bytes: no call, no download."""
    first = await produce(request_, bucket, credentials)
    _delete(bucket, first)
    before = sandbox.control.summary()
    second = await produce(request_, bucket, credentials)

    assert second.images[0].status is Status.PUBLISHED
    assert second.refetched == 0
    assert sandbox.control.summary() == before


async def test_a_missing_spool_file_is_fetched_again_for_nothing(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """One download, no call."""
    first = await produce(request_, bucket, credentials)
    _delete(bucket, first)
    for image in (Spool().root / "pictures").iterdir():
        image.unlink()
    before = sandbox.control.summary()
    second = await produce(request_, bucket, credentials)
    after = sandbox.control.summary()

    assert second.images[0].status is Status.PUBLISHED
    assert second.refetched == 1
    assert (after.calls, after.downloads) == (before.calls, before.downloads + 1)


async def test_a_changed_spool_file_is_fetched_again_for_nothing(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Bytes that rotted on the disk are refused by S3 and fetched anew; the image ends published, and right."""
    first = await produce(request_, bucket, credentials)
    _delete(bucket, first)
    (image,) = (Spool().root / "pictures").iterdir()
    content = image.read_bytes()
    image.write_bytes(content[:-2] + b"\x00\x00")
    second = await produce(request_, bucket, credentials)

    assert second.images[0].status is Status.PUBLISHED
    assert second.refetched == 1
    assert sandbox.control.summary().billed_calls == 1
    assert first.images[0].image is not None
    assert second.images[0].image is not None
    assert second.images[0].image.sha256 == first.images[0].image.sha256


async def test_a_file_that_could_not_be_fetched_again_is_not_counted_as_fetched(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """File and URL are gone: the image is paid for anew, and only that is reported."""
    _delete(bucket, await produce(request_, bucket, credentials))
    for image in (Spool().root / "pictures").iterdir():
        image.unlink()
    sandbox.control.inject("dead_url", times=1)
    second = await produce(request_, bucket, credentials)

    assert second.images[0].status is Status.PUBLISHED
    assert second.regenerated
    assert second.refetched == 0


async def test_a_dead_url_in_a_cached_answer_is_paid_for_once_more(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Neither bytes nor URL are left: one new call with the same seed, counted, and the image is published."""
    sandbox.control.inject("dead_url", times=1)
    first = await produce(request_, bucket, credentials)
    assert first.images[0].status is Status.FAILED
    sandbox.control.inject("dead_url", times=1)
    second = await produce(request_, bucket, credentials)

    assert second.images[0].status is Status.PUBLISHED
    assert second.regenerated
    assert not first.regenerated
    assert sandbox.control.summary().billed_calls == 2
    assert {row.seed for row in sandbox.control.ledger().rows} == {7}


async def test_a_url_that_stays_dead_is_paid_for_once_more_and_never_again(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Healing never loops: the answer that replaces a dead one is not replaced, whatever runs follow."""
    sandbox.control.inject("dead_url", times=None)
    for paid in (1, 2, 2, 2):
        production = await produce(request_, bucket, credentials)
        assert production.images[0].status is Status.FAILED
        assert sandbox.control.summary().billed_calls == paid


async def test_an_answer_that_prefect_lost_is_taken_from_the_spool(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    tmp_path: Path,
) -> None:
    """What a crash took from Prefect's results was in our custody before."""
    first = await produce(request_, bucket, credentials)
    _delete(bucket, first)
    with forget_results(tmp_path):
        second = await produce(request_, bucket, credentials)

    assert second.images[0].status is Status.PUBLISHED
    assert sandbox.control.summary().billed_calls == 1


async def test_the_same_request_at_once_is_paid_for_once(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Inside one process, one of the runs publishes and the others find its image."""
    sandbox.control.settings(latency=0.3)

    @flow
    async def crowd() -> list[Production]:
        return await asyncio.gather(*(produce_image(request_, bucket, credentials) for _ in range(6)))

    productions = await crowd()

    statuses = [production.images[0].status for production in productions]
    assert sorted(statuses) == [Status.PUBLISHED] + [Status.UNCHANGED] * 5
    assert sandbox.control.summary().billed_calls == 1


async def test_several_images_of_one_request_are_one_call(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Each image has its own object; one that was deleted comes back alone."""
    request = request_.model_copy(update={"num_images": 4})
    first = await produce(request, bucket, credentials)
    image = first.images[2].image
    assert image is not None
    bucket.get_client().delete_object(Bucket="images", Key=image.key)
    second = await produce(request, bucket, credentials)

    assert [outcome.status for outcome in first.images] == [Status.PUBLISHED] * 4
    assert len({outcome.image.sha256 for outcome in first.images if outcome.image}) == 4
    assert [outcome.status for outcome in second.images] == [
        Status.UNCHANGED,
        Status.UNCHANGED,
        Status.PUBLISHED,
        Status.UNCHANGED,
    ]
    assert sandbox.control.summary().billed_calls == 1


async def test_a_flagged_image_is_reported_and_never_paid_for_again(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """The service would flag the same seed again, so the flag is cached like an image."""
    sandbox.control.inject("flagged", times=1)
    first = await produce(request_, bucket, credentials)
    second = await produce(request_, bucket, credentials)

    assert first.images[0].status is second.images[0].status is Status.FLAGGED
    assert isinstance(second.error, ContentFlagged)
    assert sandbox.control.summary().billed_calls == 1
    assert _keys(bucket) == []


async def test_a_black_image_is_flagged_and_never_paid_for_again(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Its bytes stay in the spool, so not even the download is repeated."""
    sandbox.control.inject("black", times=1)
    first = await produce(request_, bucket, credentials)
    before = sandbox.control.summary()
    second = await produce(request_, bucket, credentials)

    assert first.images[0].status is second.images[0].status is Status.FLAGGED
    assert sandbox.control.summary() == before
    assert _keys(bucket) == []


async def test_an_image_missing_from_the_answer_fails_alone(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """The images that came are published."""
    sandbox.control.inject("fewer_images", times=1)
    production = await produce(request_.model_copy(update={"num_images": 2}), bucket, credentials)

    assert [outcome.status for outcome in production.images] == [Status.PUBLISHED, Status.FAILED]
    assert isinstance(production.error, EmptyGeneration)
    assert "was billed" in production.error.message


async def test_a_stranger_under_the_key_stops_before_paying(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """What could not be published is not generated."""
    key = bucket.key_of(request_, request_.fingerprint(credentials.base_url), 0)
    bucket.get_client().put_object(Bucket="images", Key=key, Body=b"something else")
    production = await produce(request_, bucket, credentials)

    assert isinstance(production.error, KeyOccupied)
    assert sandbox.control.summary().calls == 0


async def test_a_failed_upload_keeps_what_was_paid_for(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """The next run publishes the image without a call or a download."""

    def meddle(request: Passing) -> Answer:
        if request.method == "PUT" and request.path.endswith(".jpg"):
            return Answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>not this one</Message></Error>")
        return request.forward()

    assert bucket.endpoint_url is not None
    with open_proxy(bucket.endpoint_url) as proxy:
        proxy.meddle = meddle
        failed = await produce(request_, _changed(bucket, endpoint_url=proxy.url), credentials)
    before = sandbox.control.summary()
    again = await produce(request_, bucket, credentials)

    assert isinstance(failed.error, BucketError)
    assert before.billed_calls == 1
    assert again.images[0].status is Status.PUBLISHED
    assert sandbox.control.summary() == before


async def test_a_setting_that_the_server_refuses_stops_before_paying(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """A small write with the block's own settings comes before the first paid call."""
    failed = await produce(request_, _changed(bucket, storage_class="NO_SUCH_CLASS"), credentials)

    assert isinstance(failed.error, BucketError)
    assert sandbox.control.summary().calls == 0


async def test_a_missing_bucket_stops_before_paying(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """A HEAD of an image can't distinguish it from a missing image, so the bucket itself is asked."""
    production = await produce(request_, bucket.model_copy(update={"bucket_name": "nowhere"}), credentials)

    assert isinstance(production.error, BucketMissing)
    assert sandbox.control.summary().calls == 0


async def test_an_unexpected_error_does_not_hide_the_money(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """It is reported as the image's outcome, beside what the call cost."""

    class BrokenBucket(ImageBucket):
        """A bucket with a defect."""

        _block_type_slug = "broken-bucket"

        async def publish(self, file: ImageFile, run: PublishingRun) -> PublishedImage:
            """Fail as no bucket should."""
            raise ZeroDivisionError(f"{file.index} {run.flow_run_id}")

    broken = BrokenBucket.model_validate({name: getattr(bucket, name) for name in ImageBucket.model_fields})
    production = await produce(request_, broken, credentials)

    assert isinstance(production.error, UnexpectedError)
    assert "ZeroDivisionError" in production.error.message
    assert production.credits_used == 168_000
    assert sandbox.control.summary().billed_calls == 1


@pytest.mark.parametrize("shape", ["images", "data", "b64", "data_uri", "both"])
async def test_every_shape_of_answer_ends_published(
    sandbox: RunningSandbox,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    shape: str,
    tmp_path: Path,
) -> None:
    """Inline images, too, survive a lost result store; and no result holds their bytes."""
    sandbox.control.settings(response_shape=shape)
    storage = tmp_path / "results"
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: storage}):
        production = await produce(request_, bucket, credentials)

    assert production.images[0].status is Status.PUBLISHED
    assert max(path.stat().st_size for path in storage.iterdir()) < 10_000


def _delete(bucket: ImageBucket, production: Production) -> None:
    for outcome in production.images:
        assert outcome.image is not None
        bucket.get_client().delete_object(Bucket="images", Key=outcome.image.key)


def _changed(bucket: ImageBucket, **fields: Any) -> ImageBucket:
    return ImageBucket.model_validate({name: getattr(bucket, name) for name in ImageBucket.model_fields} | fields)


def _keys(bucket: ImageBucket) -> list[str]:
    """All keys below the prefix but for that of the proof that it can be written."""
    listed = bucket.get_client().list_objects_v2(Bucket="images", Prefix=bucket.prefix)
    return [item["Key"] for item in listed.get("Contents", []) if not item["Key"].endswith("/write-check.json")]
