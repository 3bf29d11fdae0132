"""Buckets and keys of prefect-aws: its saved blocks publish as our own do."""

from __future__ import annotations

import importlib
from typing import Any
from uuid import uuid4

import pytest
from prefect.blocks.core import Block
from pydantic import SecretStr

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BucketAccessDenied
from flux_prefect.flows.publish_image import publish_image
from flux_prefect.sandbox.launching import RunningSandbox


@pytest.fixture
def prefect_aws(prefect_server: str) -> Any:  # noqa: ARG001 - blocks are saved there
    """The package, with a server to save its blocks on."""
    return importlib.import_module("prefect_aws")


@pytest.fixture
def keys(prefect_aws: Any, sandbox: RunningSandbox, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The sandbox's S3 keys in an AWS Credentials block; the environment has none, so that only the block's serve."""
    environment = sandbox.environment
    block = prefect_aws.AwsCredentials(
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=SecretStr(environment["AWS_SECRET_ACCESS_KEY"]),
        region_name="us-east-1",
        aws_client_parameters={"endpoint_url": environment["AWS_ENDPOINT_URL_S3"]},
    )
    for name in environment:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    return block


@pytest.fixture
def folder() -> str:
    """A prefix of each test's own."""
    return uuid4().hex


async def test_a_saved_s3_bucket_is_published_to_by_its_name(
    prefect_aws: Any, keys: Any, folder: str, request_: ImageRequest, credentials: AimlApiCredentials
) -> None:
    """`s3-bucket/NAME` is what a deployment's parameter holds; bucket, folder, keys and endpoint are the block's."""
    name = f"images-{folder}"
    await prefect_aws.S3Bucket(bucket_name="images", bucket_folder=f"{folder}/", credentials=keys).save(name)
    (image,) = await publish_image(request_, f"s3-bucket/{name}", credentials)
    bucket = await ImageBucket.resolve(f"s3-bucket/{name}")

    assert image.uri.startswith(f"s3://images/{folder}/")
    assert await bucket.read_image(image)
    assert bucket.reference == f"s3-bucket/{name}"


async def test_saved_aws_credentials_are_named_in_the_address(
    keys: Any, folder: str, request_: ImageRequest, credentials: AimlApiCredentials
) -> None:
    """`s3://NAME@bucket/prefix` takes the keys of an AWS Credentials block; the images' addresses don't show it."""
    name = f"keys-{folder}"
    await keys.save(name)
    address = f"s3://{name}@images/{folder}"
    (image,) = await publish_image(request_, address, credentials)
    bucket = await ImageBucket.resolve(address)

    assert image.uri.startswith(f"s3://images/{folder}/")
    assert await bucket.find(request_, image.fingerprint, 0) is not None
    assert bucket.uri == f"s3://images/{folder}"
    assert bucket.reference == address


async def test_a_block_in_hand_serves_without_being_saved(prefect_aws: Any, keys: Any, folder: str) -> None:
    """From Python an S3 Bucket block itself can be resolved, also one with the keys of a MinIO server."""
    minio = prefect_aws.MinIOCredentials(
        minio_root_user=keys.aws_access_key_id,
        minio_root_password=keys.aws_secret_access_key,
        aws_client_parameters=keys.aws_client_parameters,
    )
    for credentials in (keys, minio):
        block = prefect_aws.S3Bucket(bucket_name="images", bucket_folder=folder, credentials=credentials)
        bucket = await ImageBucket.resolve(block)
        await bucket.check()
        assert bucket.reference == f"s3://images/{folder}"


async def test_wrong_keys_of_a_block_are_reported_as_usual(prefect_aws: Any, keys: Any) -> None:
    """The message is ours, and says what to check."""
    wrong = keys.model_copy(update={"aws_secret_access_key": SecretStr("wrong")})
    bucket = await ImageBucket.resolve(prefect_aws.S3Bucket(bucket_name="images", credentials=wrong))

    with pytest.raises(BucketAccessDenied, match="check the keys"):
        await bucket.check()


async def test_another_block_is_refused(keys: Any) -> None:
    """Credentials alone name no bucket."""
    block: Block = keys
    with pytest.raises(ValueError, match="bucket is a block of type aws-credentials"):
        await ImageBucket.resolve(block)


async def test_keys_in_an_address_are_refused_and_not_repeated() -> None:
    """Only the name of a block may stand before the @; a message must not carry a secret into the logs."""
    with pytest.raises(ValueError, match="keep keys out of it") as caught:
        await ImageBucket.resolve("s3://AKIA1234:topsecret@images/catalogue")

    assert "topsecret" not in str(caught.value)
