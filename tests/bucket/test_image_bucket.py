"""The bucket block against a real S3 server."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path

import pytest
from prefect.blocks.core import Block
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError
from support.images import make_file
from support.s3_proxy import Answer, Passing, open_proxy

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishingRun
from flux_prefect.errors import (
    BucketAccessDenied,
    BucketError,
    BucketMissing,
    BucketUnavailable,
    ImageChanged,
    KeyOccupied,
)
from flux_prefect.host.spool import ImageFile

ENDPOINT = "http://127.0.0.1:9"
RUN = PublishingRun(flow_run_id="run-1", flow_run_name="nightly")


class TestBlock(BlockStandardTestSuite):
    """Prefect's own demands on a block."""

    @pytest.fixture
    def block(self) -> type[ImageBucket]:
        """The block that the suite examines."""
        return ImageBucket

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """The logo is the one that Prefect hosts for its file systems; the suite would fetch it from the network."""
        assert str(block._logo_url) == str(LocalFileSystem._logo_url)


@pytest.fixture
def file(tmp_path: Path, request_: ImageRequest) -> ImageFile:
    """An image that is not in the bucket yet."""
    return make_file(tmp_path, request_)


async def test_a_published_image_is_found_as_it_was_published(bucket: ImageBucket, file: ImageFile) -> None:
    """One HEAD returns all that the upload returned, except who wrote it."""
    published = await bucket.publish(file, RUN)
    found = await bucket.find(file.generation.request, file.generation.fingerprint, 0)

    assert published.created
    assert found is not None
    assert not found.created
    assert found.model_dump(exclude={"created", "published_at"}) == published.model_dump(
        exclude={"created", "published_at"}
    )
    assert published.uri == f"s3://images/{bucket.prefix}/{file.generation.fingerprint}-0.jpg"


async def test_the_object_has_the_bytes_and_headers_of_an_image(bucket: ImageBucket, file: ImageFile) -> None:
    """Content type, cache control and metadata are there for a server of the bucket."""
    published = await bucket.publish(file, RUN)
    stored = bucket.get_client().get_object(Bucket="images", Key=published.key)

    assert stored["Body"].read() == file.path.read_bytes()
    assert stored["ContentType"] == "image/jpeg"
    assert stored["CacheControl"] == "public, max-age=31536000, immutable"
    assert stored["Metadata"]["flux-seed"] == "7"
    assert stored["Metadata"]["flux-sha256"] == file.sha256


async def test_the_record_beside_an_image_can_make_it_again(bucket: ImageBucket, file: ImageFile) -> None:
    """The sidecar holds the whole request, the seed, the cost, the ids and the run."""
    published = await bucket.publish(file, RUN)
    record = json.loads(bucket.get_client().get_object(Bucket="images", Key=published.sidecar_key)["Body"].read())

    assert ImageRequest.model_validate(record["request"]) == file.generation.request
    assert record["credits_used"] == 168_000
    assert record["client_request_id"] == "fp-1"
    assert record["sha256"] == file.sha256
    assert record["run"] == {"flow_run_id": "run-1", "flow_run_name": "nightly"}


async def test_publishing_again_changes_nothing(bucket: ImageBucket, file: ImageFile) -> None:
    """The second upload finds the first and says so."""
    first = await bucket.publish(file, RUN)
    second = await bucket.publish(file, PublishingRun(flow_run_id="run-2"))

    assert not second.created
    assert second.etag == first.etag
    assert _count_objects(bucket) == 2


async def test_of_many_publishers_at_once_one_creates_the_object(bucket: ImageBucket, file: ImageFile) -> None:
    """The bucket decides: no publisher fails, and all return the one object."""
    published = await asyncio.gather(*(bucket.publish(file, RUN) for _ in range(12)))

    assert [image.created for image in published].count(True) == 1
    assert {image.sha256 for image in published} == {file.sha256}
    assert _count_objects(bucket) == 2


async def test_the_record_of_a_loser_never_describes_the_winner(
    bucket: ImageBucket, tmp_path: Path, request_: ImageRequest
) -> None:
    """Two hosts with different bytes for one key: what stands beside the object is about its bytes."""
    first, second = make_file(tmp_path, request_), make_file(tmp_path, request_, (200, 30, 30))
    await bucket.publish(first, RUN)
    published = await bucket.publish(second, RUN)

    assert published.sha256 == first.sha256
    record = json.loads(bucket.get_client().get_object(Bucket="images", Key=published.sidecar_key)["Body"].read())
    assert record["sha256"] == first.sha256


async def test_changed_bytes_are_refused_by_the_server(bucket: ImageBucket, file: ImageFile) -> None:
    """A file that was altered since it was checked never becomes an object."""
    file.path.write_bytes(file.path.read_bytes()[:-1] + b"\x00")

    with pytest.raises(ImageChanged, match="changed since it was checked"):
        await bucket.publish(file, RUN)
    assert await bucket.find(file.generation.request, file.generation.fingerprint, 0) is None


async def test_a_stranger_under_the_key_is_not_taken_for_the_image(bucket: ImageBucket, file: ImageFile) -> None:
    """An object without our metadata is an error that says what to do, before anything is paid for."""
    key = bucket.key_of(file.generation.request, file.generation.fingerprint, 0)
    bucket.get_client().put_object(Bucket="images", Key=key, Body=b"something else")

    with pytest.raises(KeyOccupied, match="Remove it, or publish under another prefix"):
        await bucket.find(file.generation.request, file.generation.fingerprint, 0)
    with pytest.raises(KeyOccupied):
        await bucket.publish(file, RUN)


async def test_read_image_proves_the_bytes(bucket: ImageBucket, file: ImageFile) -> None:
    """What is read back is what was published, or an error."""
    published = await bucket.publish(file, RUN)
    assert await bucket.read_image(published) == file.path.read_bytes()

    bucket.get_client().put_object(Bucket="images", Key=published.key, Body=b"overwritten")
    with pytest.raises(ImageChanged, match="SHA-256 differs"):
        await bucket.read_image(published)


async def test_a_missing_bucket_is_named(bucket: ImageBucket) -> None:
    """The check fails with the bucket's name and what to do."""
    with pytest.raises(BucketMissing, match="'nowhere' does not exist"):
        await bucket.model_copy(update={"bucket_name": "nowhere"}).check()


@pytest.mark.parametrize(
    "keys",
    [
        {"aws_access_key_id": "WRONGACCESSKEY000"},
        {"aws_secret_access_key": SecretStr("wrong-secret")},
    ],
)
async def test_wrong_keys_are_refused(bucket: ImageBucket, keys: dict[str, object]) -> None:
    """The check fails before anything is paid for, and the message names no key."""
    wrong = ImageBucket.model_validate({**_fields(bucket), **keys})

    with pytest.raises(BucketAccessDenied, match="check the keys") as caught:
        await wrong.check()
    assert "wrong-secret" not in str(caught.value)


async def test_missing_keys_are_reported(bucket: ImageBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any keys the message says where to put them."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    keyless = ImageBucket(bucket_name="images", endpoint_url=bucket.endpoint_url)

    with pytest.raises(BucketAccessDenied, match="set AWS_ACCESS_KEY_ID"):
        await keyless.check()


async def test_an_unreachable_server_can_be_tried_again(bucket: ImageBucket) -> None:
    """No connection is a passing failure."""
    nowhere = ImageBucket.model_validate({**_fields(bucket), "endpoint_url": "http://127.0.0.1:9"})

    with pytest.raises(BucketUnavailable, match="endpoint_url") as caught:
        await nowhere.check()
    assert caught.value.retryable


async def test_what_a_server_does_not_know_is_not_tried_again(bucket: ImageBucket, file: ImageFile) -> None:
    """A 501 stays one."""

    def meddle(request: Passing) -> Answer:
        if request.method == "PUT":
            return Answer(501, {}, b"<Error><Code>NotImplemented</Code><Message>no such class</Message></Error>")
        return request.forward()

    assert bucket.endpoint_url is not None
    with open_proxy(bucket.endpoint_url) as proxy:
        proxy.meddle = meddle
        simple = ImageBucket.model_validate({**_fields(bucket), "endpoint_url": proxy.url})
        with pytest.raises(BucketError, match=r"NotImplemented: no such class.*storage_class") as caught:
            await simple.publish(file, RUN)
        assert proxy.count("PUT", "") == 1
    assert not caught.value.retryable


def test_an_address_names_bucket_and_prefix() -> None:
    """`s3://name/prefix` in all its forms."""
    assert ImageBucket.from_uri("s3://images/a/b/").uri == "s3://images/a/b"
    assert ImageBucket.from_uri("s3://images").prefix == ""


@pytest.mark.parametrize("address", ["images/a", "https://images/a", "s3:///a", "s3://", "s3://a/b?x=1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    """The message shows the right form."""
    with pytest.raises(ValueError, match="s3://name/prefix"):
        ImageBucket.from_uri(address)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prefix", "a/../b", "dot segment"),
        ("prefix", "a//b", "empty or dot segment"),
        ("bucket_name", "s3://images", "no plain name"),
        ("key_template", "{index}.jpg", "lacks {fingerprint}"),
        ("aws_access_key_id", "ONLYONE", "go together"),
    ],
)
def test_bad_fields_are_refused(field: str, value: str, message: str) -> None:
    """The error names the field and the remedy."""
    with pytest.raises(ValidationError, match=message):
        ImageBucket.model_validate({"bucket_name": "images", field: value})


async def test_public_addresses_are_quoted(bucket: ImageBucket, file: ImageFile) -> None:
    """A CDN's address is its root and the key."""
    cdn = ImageBucket.model_validate(
        {**_fields(bucket), "prefix": f"{bucket.prefix}/für alle", "public_base_url": "https://cdn.example.com/"}
    )
    published = await cdn.publish(file, RUN)
    found = await cdn.find(file.generation.request, file.generation.fingerprint, 0)

    assert published.url == (
        f"https://cdn.example.com/{bucket.prefix}/f%C3%BCr%20alle/{file.generation.fingerprint}-0.jpg"
    )
    assert found is not None
    assert found.url == published.url


async def test_keys_are_listed_below_the_prefix_alone(bucket: ImageBucket) -> None:
    """All of them or, where there are more than wanted, none; a neighbour whose name begins the same is no part."""
    neighbour = bucket.model_copy(update={"prefix": f"{bucket.prefix}-2"})
    await neighbour.write_path("c", b"x")
    assert await bucket.list_keys(most=0) == frozenset()
    await bucket.write_path("a", b"x")
    await bucket.write_path("folder/b", b"x")

    assert await bucket.list_keys(most=2) == frozenset({f"{bucket.prefix}/a", f"{bucket.prefix}/folder/b"})
    assert await bucket.list_keys(most=1) is None


async def test_a_pickled_bucket_works_elsewhere(bucket: ImageBucket) -> None:
    """Task runners of other processes pickle what a task is given; a client stays where it was made."""
    await bucket.write_path("a", b"x")
    copy = pickle.loads(pickle.dumps(bucket))  # noqa: S301 - our own

    assert copy.model_dump() == bucket.model_dump()
    assert await copy.read_path("a") == b"x"
    assert copy.get_client() is not bucket.get_client()


@pytest.mark.usefixtures("prefect_server")
async def test_results_of_prefect_can_live_in_the_bucket(bucket: ImageBucket) -> None:
    """The saved block is a `WritableFileSystem`: a result written by one store is read by another."""
    await bucket.asave("results", overwrite=True)
    await ResultStore(result_storage=bucket).awrite(key="some/key", obj={"paid": True}, holder="a")
    store = ResultStore(result_storage=await ImageBucket.aload("results"))

    assert await store.aexists("some/key")
    assert (await store.aread("some/key", holder="b")).result == {"paid": True}
    assert not await store.aexists("some/other-key")


@pytest.mark.parametrize("path", ["../secret", "", "/", "a/../../b"])
async def test_results_never_leave_the_prefix(bucket: ImageBucket, path: str) -> None:
    """A path that would is refused."""
    with pytest.raises(ValueError, match=r"segment|empty"):
        await bucket.write_path(path, b"x")


@pytest.mark.parametrize("field", ["aws_secret_access_key", "aws_session_token"])
def test_a_bad_block_does_not_print_its_keys(field: str) -> None:
    """What pydantic would show of the input is left out."""
    with pytest.raises(ValidationError) as caught:
        ImageBucket.model_validate({"bucket_name": "a/b", field: "S3CRET"})
    assert "S3CRET" not in str(caught.value)


async def test_a_missing_file_says_how_to_get_it_back(bucket: ImageBucket, file: ImageFile) -> None:
    """The message says what to do where the tasks are called one by one."""
    file.path.unlink()
    with pytest.raises(ImageChanged, match=r"download_image\.with_options\(refresh_cache=True\)"):
        await bucket.publish(file, RUN)


async def test_an_endpoint_that_is_no_url_is_named(bucket: ImageBucket) -> None:
    """With the setting to correct."""
    with pytest.raises(BucketError, match="endpoint_url"):
        await ImageBucket.model_validate({**_fields(bucket), "endpoint_url": "127.0.0.1:9999"}).check()


async def test_keys_appear_nowhere(bucket: ImageBucket) -> None:
    """Neither in the block's text nor in its JSON."""
    assert bucket.aws_secret_access_key is not None
    secret = bucket.aws_secret_access_key.get_secret_value()
    assert secret not in repr(bucket)
    assert secret not in bucket.model_dump_json()


def _fields(bucket: ImageBucket) -> dict[str, object]:
    return {name: getattr(bucket, name) for name in ImageBucket.model_fields}


def _count_objects(bucket: ImageBucket) -> int:
    return bucket.get_client().list_objects_v2(Bucket="images", Prefix=bucket.prefix)["KeyCount"]
