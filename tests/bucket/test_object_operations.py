"""What goes with every request to S3, seen on its way to a real server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr, ValidationError
from support.images import make_file
from support.s3_proxy import Answer, Meddler, Passing, Proxy, open_proxy, pass_on
from support.tls import make_certificate

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.conditional_object import ConditionalObject
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishingRun
from flux_prefect.errors import BucketError, ChecksumsRefused, ConditionsIgnored, ImageChanged, KeyOccupied
from flux_prefect.host.spool import ImageFile
from flux_prefect.manifest.inspection import set_aside

RUN = PublishingRun()
OWNER = "123456789012"
ACCESS_POINT = f"arn:aws:s3:eu-west-1:{OWNER}:accesspoint/shop"


@dataclass
class Way:
    """A way to the sandbox's S3 server that notes the headers of every request.

    Attributes:
        proxy: the address.
        headers: of each request so far, names in lower case, with its method.
        meddle: what happens to requests after they are noted.
    """

    proxy: Proxy
    headers: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    meddle: Meddler = pass_on

    def writes(self) -> list[Mapping[str, str]]:
        """The headers of all PUTs."""
        return [headers for method, headers in self.headers if method == "PUT"]


def note(proxy: Proxy) -> Way:
    """Begin to note."""
    way = Way(proxy)

    def meddle(request: Passing) -> Answer | None:
        way.headers.append((request.method, {name.lower(): value for name, value in request.headers.items()}))
        return way.meddle(request)

    proxy.meddle = meddle
    return way


@pytest.fixture
def way(bucket: ImageBucket) -> Iterator[Way]:
    """Over plain HTTP."""
    assert bucket.endpoint_url is not None
    with open_proxy(bucket.endpoint_url) as proxy:
        yield note(proxy)


@pytest.fixture
def file(tmp_path: Path, request_: ImageRequest) -> ImageFile:
    """An image that is not in the bucket yet."""
    return make_file(tmp_path, request_)


def changed(bucket: ImageBucket, way: Way, **fields: Any) -> ImageBucket:
    """The bucket behind the way, with other fields."""
    values = {name: getattr(bucket, name) for name in ImageBucket.model_fields}
    return ImageBucket.model_validate({**values, "endpoint_url": way.proxy.url, **fields})


async def write_everything(bucket: ImageBucket, file: ImageFile) -> None:
    """Every kind of write: probe, sidecar, image, result, manifest, lease, and an audit's copy."""
    await bucket.prove_writable()
    image = await bucket.publish(file, RUN)
    await bucket.write_path("result", b"{}")
    await bucket.put_file("manifests/m.jsonl", io.BytesIO(b"{}\n"), content_type="x/y", cache_control="no-cache")
    lease = ConditionalObject(bucket, "leases/a.json", patience=10)
    etag = await lease.write(b"1", over=None)
    assert await lease.write(b"2", over=etag) is not None
    await set_aside(bucket, image)


def refuse(status: int, code: str, message: str) -> Answer:
    """An S3 server's error."""
    return Answer(status, {}, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())


async def test_every_write_has_the_storage_class_and_encryption_of_the_block(
    bucket: ImageBucket, way: Way, file: ImageFile
) -> None:
    """Results, manifests, leases and copies as images."""
    await write_everything(changed(bucket, way, storage_class="STANDARD_IA", server_side_encryption="AES256"), file)

    assert len(way.writes()) == 9
    for headers in way.writes():
        assert headers["x-amz-storage-class"] == "STANDARD_IA"
        assert headers["x-amz-server-side-encryption"] == "AES256"


async def test_every_write_has_the_tags_of_the_block_and_none_has_an_acl(
    bucket: ImageBucket, way: Way, file: ImageFile
) -> None:
    """A copy has the block's tags, not those of its source. Buckets without ACLs take every write."""
    tagged = changed(bucket, way, tags={"team": "shop/spring + sale", "cost": "42"})
    await write_everything(tagged, file)

    assert len(way.writes()) == 9
    for headers in way.writes():
        assert headers["x-amz-tagging"] == "team=shop%2Fspring%20%2B%20sale&cost=42"
        assert "x-amz-acl" not in headers
    stored = bucket.get_client().get_object_tagging(Bucket="images", Key=f"{bucket.prefix}/result")
    assert {tag["Key"]: tag["Value"] for tag in stored["TagSet"]} == tagged.tags


async def test_every_request_names_the_owner_that_is_expected(bucket: ImageBucket, way: Way, file: ImageFile) -> None:
    """Reads as well, so that images never go to a stranger's bucket of the same name."""
    owned = changed(bucket, way, expected_bucket_owner=OWNER)
    await owned.check()
    await write_everything(owned, file)
    await owned.list_keys(most=100)
    await owned.find(file.generation.request, file.generation.fingerprint, 0)
    await owned.read_path("result")
    await ConditionalObject(owned, "leases/a.json", patience=10).remove('"0"')

    assert {method for method, _ in way.headers} == {"GET", "HEAD", "PUT", "DELETE"}
    for _, headers in way.headers:
        assert headers["x-amz-expected-bucket-owner"] == OWNER
    copies = [headers for headers in way.writes() if "x-amz-copy-source" in headers]
    assert [headers["x-amz-source-expected-bucket-owner"] for headers in copies] == [OWNER]


async def test_an_archive_takes_images_alone(bucket: ImageBucket, way: Way, file: ImageFile) -> None:
    """Manifests, records, leases and results are read again, which an archive does not allow at once."""
    await write_everything(changed(bucket, way, storage_class="DEEP_ARCHIVE"), file)

    archived = [headers for headers in way.writes() if "x-amz-storage-class" in headers]
    assert [headers["content-type"] for headers in archived] == ["image/jpeg"]


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
async def test_over_tls_no_write_has_a_trailer(
    bucket: ImageBucket,
    file: ImageFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checksums: str,
) -> None:
    """The digest is a plain header: some servers refuse the trailers that boto3 sends by itself over TLS."""
    certificate, context = make_certificate(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    assert bucket.endpoint_url is not None
    with open_proxy(bucket.endpoint_url, tls=context) as proxy:
        way = note(proxy)
        assert proxy.url.startswith("https://")
        await write_everything(changed(bucket, way, checksums=checksums), file)

    puts = [headers for headers in way.writes() if "x-amz-copy-source" not in headers]
    assert len(puts) == 8
    for headers in puts:
        assert "x-amz-trailer" not in headers
        assert "aws-chunked" not in headers.get("content-encoding", "")
        assert ("x-amz-checksum-sha256" in headers) == (checksums == "when_supported")
        assert ("content-md5" in headers) == (checksums == "when_required")


async def test_without_checksum_headers_the_bytes_are_verified_all_the_same(
    bucket: ImageBucket, way: Way, file: ImageFile
) -> None:
    """`when_required` sends no checksum header of any kind, and a changed file still becomes no object."""
    plain = changed(bucket, way, checksums="when_required")
    file.path.write_bytes(file.path.read_bytes()[:-1] + b"\x00")

    with pytest.raises(ImageChanged, match="changed since it was checked"):
        await plain.publish(file, RUN)
    assert await plain.find(file.generation.request, file.generation.fingerprint, 0) is None
    assert not [name for _, headers in way.headers for name in headers if "checksum" in name]


async def test_bytes_that_change_on_the_way_are_refused_by_the_server(bucket: ImageBucket) -> None:
    """The MD5 that stands in for the SHA-256 is checked where it arrives."""
    client = changed(bucket, Way(Proxy(str(bucket.endpoint_url))), checksums="when_required").get_client()

    with pytest.raises(client.exceptions.ClientError, match=r"BadDigest|InvalidDigest|MD5"):
        client.put_object(Bucket="images", Key=f"{bucket.prefix}/x", Body=b"x", ContentMD5="1B2M2Y8AsgTpgAmY7PhCfg==")


@pytest.mark.parametrize(
    "answer",
    [
        refuse(400, "InvalidArgument", "Unsupported header 'x-amz-checksum-sha256' received for this API call."),
        refuse(401, "Unauthorized", "Unauthorized"),
        refuse(501, "NotImplemented", "Header 'x-amz-checksum-sha256' with value not implemented"),
    ],
)
async def test_a_server_that_knows_no_checksum_headers_is_met_with_the_setting(
    bucket: ImageBucket, way: Way, file: ImageFile, answer: Answer
) -> None:
    """The error names `checksums`, and with the setting the same server takes everything."""

    def meddle(request: Passing) -> Answer:
        if any(name.lower().startswith("x-amz-checksum-") for name in request.headers):
            return answer
        return request.forward()

    way.meddle = meddle
    with pytest.raises(ChecksumsRefused, match=r"checksums .* to when_required") as caught:
        await changed(bucket, way).publish(file, RUN)
    assert caught.value.fatal

    await write_everything(changed(bucket, way, checksums="when_required"), file)


async def test_a_server_that_refuses_conditions_is_named(bucket: ImageBucket, way: Way, file: ImageFile) -> None:
    """With the feature that it lacks, and before anything is paid for."""

    def meddle(request: Passing) -> Answer:
        if any(name.lower() == "if-none-match" for name in request.headers):
            body = (
                "<Error><Code>NotImplemented</Code><Message>A header you provided implies functionality that is not "
                "implemented</Message><Header>If-None-Match</Header></Error>"
            )
            return Answer(501, {}, body.encode())
        return request.forward()

    way.meddle = meddle
    other = changed(bucket, way)
    for attempt in (other.prove_writable(), other.publish(file, RUN)):
        with pytest.raises(ConditionsIgnored, match="conditional writes"):
            await attempt


async def test_a_server_that_overlooks_conditions_is_found_before_money(bucket: ImageBucket, way: Way) -> None:
    """It would let the second of two publishers replace what the first has published."""
    overlooking = changed(bucket, way)
    client = overlooking.get_client()
    client.meta.events.register(
        "before-sign.s3.PutObject", lambda request, **_: request.headers.__delitem__("If-None-Match")
    )

    with pytest.raises(ConditionsIgnored, match="conditional writes"):
        await overlooking.prove_writable()


async def test_writing_is_proven_once_by_one_put(bucket: ImageBucket, way: Way) -> None:
    """However many ask at once. The object stays, and says what it is for."""
    first, again = changed(bucket, way), changed(bucket, way)
    await asyncio.gather(*(first.prove_writable() for _ in range(8)))
    assert len(way.writes()) == 2  # written, and refused when it is there
    await again.prove_writable()
    await again.prove_writable()

    assert len(way.writes()) == 3
    assert b"proves" in await bucket.read_path("manifests/write-check.json")


@pytest.mark.parametrize("field_name", ["fingerprint", "index"])
async def test_an_image_of_another_row_under_a_rows_key_is_not_believed(
    bucket: ImageBucket, file: ImageFile, field_name: str
) -> None:
    """It was copied or renamed there: neither found as published, nor taken for the upload's own."""
    generation = file.generation
    key = bucket.key_of(generation.request, generation.fingerprint, 0)
    metadata = {
        "flux-fingerprint": generation.fingerprint,
        "flux-index": "0",
        "flux-sha256": file.sha256,
        "flux-width": "48",
        "flux-height": "32",
        "flux-seed": "7",
    } | {f"flux-{field_name}": {"fingerprint": "0" * 64, "index": "1"}[field_name]}
    bucket.get_client().put_object(
        Bucket="images", Key=key, Body=file.path.read_bytes(), ContentType="image/jpeg", Metadata=metadata
    )

    with pytest.raises(KeyOccupied, match="another request's image"):
        await bucket.find(generation.request, generation.fingerprint, 0)
    with pytest.raises(KeyOccupied, match="Remove it, or publish under another prefix"):
        await bucket.publish(file, RUN)


@pytest.mark.usefixtures("prefect_server")
async def test_a_saved_bucket_is_found_by_its_type_and_name(bucket: ImageBucket) -> None:
    """`image-bucket/NAME`, as Prefect writes it, is the same as `NAME`."""
    name = f"images-{uuid4().hex}"
    await bucket.asave(name)

    for text in (name, f"image-bucket/{name}"):
        found = await ImageBucket.resolve(text)
        assert found.prefix == bucket.prefix
        assert found.reference == name


async def test_requests_to_an_access_point_go_to_its_own_host() -> None:
    """An access point's ARN is a bucket's name like any other, also in an address."""
    bucket = ImageBucket.from_uri(f"s3://{ACCESS_POINT}/spring/sale")
    assert (bucket.bucket_name, bucket.prefix) == (ACCESS_POINT, "spring/sale")
    assert bucket.uri == f"s3://{ACCESS_POINT}/spring/sale"
    assert ImageBucket.from_uri(f"s3://{ACCESS_POINT}").prefix == ""

    keys = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": SecretStr("made up")}
    client = ImageBucket(bucket_name=ACCESS_POINT, region_name="eu-west-1", **keys).get_client()
    address = client.generate_presigned_url("get_object", Params={"Bucket": ACCESS_POINT, "Key": "a.jpg"})
    assert address.startswith(f"https://shop-{OWNER}.s3-accesspoint.eu-west-1.amazonaws.com/a.jpg?")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bucket_name": "arn:aws:s3:::images"}, "access point"),
        ({"bucket_name": f"{ACCESS_POINT}/below"}, "access point"),
        ({"expected_bucket_owner": "1234"}, "12 digits"),
        ({"tags": {str(number): "x" for number in range(11)}}, "at most 10 tags"),
        ({"tags": {"": "x"}}, "1 to 128 characters"),
        ({"tags": {"x": "y" * 257}}, "256 characters"),
        ({"tags": {"x": "a & b"}}, "letters, digits, spaces"),
    ],
)
def test_fields_that_s3_would_refuse_are_refused_at_once(fields: dict[str, Any], message: str) -> None:
    """With what is allowed."""
    with pytest.raises(ValidationError, match=message):
        ImageBucket.model_validate({"bucket_name": "images", **fields})


async def test_other_refusals_of_the_server_stay_what_they_are(bucket: ImageBucket, way: Way, file: ImageFile) -> None:
    """A 400 that is not about checksums does not blame them."""
    way.meddle = lambda request: refuse(400, "InvalidArgument", "bad tag") if request.method == "PUT" else None
    with pytest.raises(BucketError, match="bad tag") as caught:
        await changed(bucket, way).publish(file, RUN)
    assert type(caught.value) is BucketError
