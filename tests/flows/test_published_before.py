"""Images that release 0.1.0 published, with their records beside them."""

from __future__ import annotations

from uuid import uuid4

import pytest
from support import published_before

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.flows.audit_bucket import audit_bucket
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.sandbox.launching import RunningSandbox


@pytest.mark.usefixtures("prefect_server")
async def test_they_are_unchanged_and_new_images_have_their_records_apart(
    bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """A run pays for the new row alone. The audits of the old manifest and of the new one pass, every byte read."""
    published_before.restore(bucket, credentials.base_url)
    rows = [
        published_before.ROW,
        {"id": "new", "prompt": f"a new one {uuid4().hex}", "seed": 2, "aspect_ratio": "9:21"},
    ]
    old = await audit_bucket(f"{bucket.uri}/manifests/latest.jsonl", bucket, deep=True)
    report = await publish_batch(rows, bucket, credentials)

    assert report.counts == {"unchanged": 1, "published": 1}
    assert sandbox.control.summary().billed_calls == 1
    (red,), (new,) = (item.images for item in report.items)
    assert red.sidecar_key == f"{red.key}.{red.sha256[:16]}.json"
    assert new.sidecar_key.startswith(f"{bucket.prefix}/records/")
    assert report.manifest is not None
    both = await audit_bucket(report.manifest, bucket, deep=True)
    assert (old.counts, both.counts) == ({"ok": 1}, {"ok": 2})
