"""A manifest against its bucket: what is found, and what comes back without being paid for twice."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.utilities.callables import parameter_schema
from support.nursery import Nursery

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import AuditFailed, TableError
from flux_prefect.flows.audit_bucket import audit_bucket
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.inspection import inspect_published
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.manifest.writer import record_line
from flux_prefect.sandbox.launching import RunningSandbox

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
async def published(bucket: ImageBucket, credentials: AimlApiCredentials) -> BatchReport:
    """Five images as a batch has published them."""
    name = uuid4().hex
    rows = [{"id": str(n), "prompt": f"{n} of {name}", "seed": n, "aspect_ratio": "1:1"} for n in range(1, 6)]
    return await publish_batch(rows, bucket, credentials)


def images(report: BatchReport) -> list[PublishedImage]:
    """Every image, in the table's order."""
    return [image for item in report.items for image in item.images]


def remove(bucket: ImageBucket, key: str) -> None:
    """Take an object away."""
    bucket.get_client().delete_object(Bucket=bucket.bucket_name, Key=key)


def overwrite(bucket: ImageBucket, image: PublishedImage, content: bytes, **metadata: str) -> None:
    """Put something else under an image's key."""
    bucket.get_client().put_object(Bucket=bucket.bucket_name, Key=image.key, Body=content, Metadata=metadata)


def spoil(bucket: ImageBucket, report: BatchReport) -> list[PublishedImage]:
    """The first image gone, the second another, the third without its record, the fourth with other bytes inside."""
    first, second, third, fourth, fifth = images(report)
    remove(bucket, first.key)
    overwrite(bucket, second, b"somebody's notes")
    remove(bucket, third.sidecar_key)
    overwrite(bucket, fourth, bytes(fourth.size), **{"flux-sha256": fourth.sha256})
    return [first, second, third, fourth, fifth]


async def test_finds_what_differs_and_changes_nothing(
    published: BatchReport, bucket: ImageBucket, sandbox: RunningSandbox
) -> None:
    """A clean bucket is Completed; a spoilt one is Failed with each finding, and stays as it is."""
    assert published.manifest is not None
    clean = await audit_bucket(published.manifest, bucket, deep=True)
    images = spoil(bucket, published)
    with pytest.raises(AuditFailed, match="still wrong") as caught:
        await audit_bucket(published.manifest, bucket, deep=True)

    assert clean.counts == {"ok": 5}
    report = caught.value.report
    assert {each.id: each.finding for each in report.problems} == {
        "1": "missing",
        "2": "wrong_checksum",
        "3": "missing_sidecar",
        "4": "wrong_checksum",
    }
    assert report.counts["ok"] == 1
    assert (await inspect_published(bucket, images[0], deep=False)).finding == "missing"
    assert sandbox.control.summary().billed_calls == 5


async def test_puts_back_from_the_spool_for_nothing(
    published: BatchReport, bucket: ImageBucket, sandbox: RunningSandbox
) -> None:
    """Byte for byte. What stands in an image's place is only taken away where that is asked for, and is kept."""
    assert published.manifest is not None
    images = spoil(bucket, published)
    with pytest.raises(AuditFailed) as caught:
        await audit_bucket(published.manifest, bucket, deep=True, repair=True)
    notes = bucket.get_client().get_object(Bucket=bucket.bucket_name, Key=images[1].key)["Body"].read()
    after = await audit_bucket(published.manifest, bucket, deep=True, repair=True, replace=True)

    assert caught.value.report.mended == {"put back from the spool": 2}
    assert {each.id for each in caught.value.report.problems if each.mended is None} == {"2", "4"}
    assert notes == b"somebody's notes"
    assert after.mended == {"put back from the spool": 2}
    assert [(await inspect_published(bucket, image, deep=True)).finding for image in images] == ["ok"] * 5
    kept = bucket.get_client().list_objects_v2(Bucket=bucket.bucket_name, Prefix=f"{bucket.prefix}/replaced/")
    assert b"somebody's notes" in [
        bucket.get_client().get_object(Bucket=bucket.bucket_name, Key=found["Key"])["Body"].read()
        for found in kept["Contents"]
    ]
    assert sandbox.control.summary().billed_calls == 5


async def test_generates_again_what_the_spool_has_not(
    published: BatchReport,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    sandbox: RunningSandbox,
    tmp_path: Path,
) -> None:
    """With the same seed under the same key, never over the cap; the rest is reported and left for the next run."""
    assert published.records is not None
    manifest = tmp_path / "manifest.jsonl"
    shutil.copy(published.records, manifest)
    first, second, third, *_ = images(published)
    remove(bucket, first.key)
    remove(bucket, second.key)
    remove(bucket, third.sidecar_key)
    shutil.rmtree(Spool().root)
    sandbox.control.reset()  # the addresses of all it has made are dead now
    options: dict[str, Any] = {"repair": True, "regenerate": True, "credentials": credentials}
    with pytest.raises(AuditFailed) as caught:
        await audit_bucket(str(manifest), bucket, max_images=1, **options)
    again = await audit_bucket(str(manifest), bucket, return_state=True)

    report = caught.value.report
    assert report.counts == {"missing": 2, "missing_sidecar": 1, "ok": 2}
    assert report.mended == {"published again": 1}
    assert report.still_wrong == 2
    wrong = sorted(each.message for each in report.problems if each.mended is None)
    assert wrong[0].startswith("Not sent: ")
    assert wrong[1] == "no spool of this host has its record, and an image that exists is not paid for again"
    assert [row.seed for row in sandbox.control.ledger().rows] in ([1], [2])
    assert str(again.message) == "5 images: 3 ok, 1 missing, 1 missing_sidecar; 2 still wrong"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"regenerate": True}, "set max_credits or max_images"), ({"replace": True}, "set repair or regenerate")],
)
async def test_settings_that_contradict_are_refused(options: dict[str, Any], message: str, bucket: ImageBucket) -> None:
    """Before anything is looked at."""
    with pytest.raises(ValueError, match=message):
        await audit_bucket("nowhere.jsonl", bucket, **options)


async def test_a_table_is_no_manifest(bucket: ImageBucket, tmp_path: Path) -> None:
    """The error says that a line is not a manifest record."""
    table = tmp_path / "prompts.jsonl"
    table.write_text(json.dumps({"prompt": "a fox"}) + "\n", encoding="utf-8")
    with pytest.raises(TableError, match="is not a manifest record"):
        await audit_bucket(str(table), bucket)


def test_the_form_has_help_and_bounds() -> None:
    """What the UI builds its form from."""
    schema = parameter_schema(audit_bucket)

    assert schema.required == ["manifest", "bucket"]
    assert all(field.get("description") for field in schema.properties.values())
    assert schema.properties["at_once"]["maximum"] == 64


def test_from_a_shell(bucket: ImageBucket, nursery: Nursery, tmp_path: Path) -> None:
    """What is wrong is on the screen, and the exit status says so."""
    key = "0" * 32 + "-0.jpg"
    image = PublishedImage(
        bucket=bucket.bucket_name,
        key=key,
        uri=f"s3://{bucket.bucket_name}/{key}",
        url=None,
        etag="0",
        sha256="0" * 64,
        size=1,
        content_type="image/jpeg",
        width=1,
        height=1,
        fingerprint="0" * 32,
        index=0,
        seed=1,
        sidecar_key=f"{key}.json",
        published_at=datetime.now(timezone.utc),
        created=True,
    )
    record = ItemRecord(row=1, id="fox", status="published", request=None, images=(image,))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(record_line(record, "a-run"))
    ended = nursery.run("audit", str(manifest), "--bucket", bucket.uri)

    assert ended.returncode == 1
    assert "missing" in ended.stdout
    assert "Failed: 1 images: 1 missing; 1 still wrong" in ended.stderr
