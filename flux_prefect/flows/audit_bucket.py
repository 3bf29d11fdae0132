"""Compare a manifest with its bucket and restore missing images."""

from __future__ import annotations

import tempfile
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

from prefect import flow
from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishingRun
from flux_prefect.concurrency import for_each
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import AuditFailed
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice, CreditCap, ImageCap
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.manifest.audit import Audit, AuditReport, read_manifest_items, tabulate_audit
from flux_prefect.tables.sources import open_source

__all__ = ["audit_bucket"]


def _name_run() -> str:
    # Only the last parts: the query of a signed address is a secret.
    return f"audit {'/'.join(urlsplit(flow_run.parameters['manifest']).path.split('/')[-2:])}"


@flow(name="audit-bucket", flow_run_name=_name_run)
async def audit_bucket(
    manifest: str,
    bucket: BucketChoice,
    deep: bool = False,  # noqa: FBT001, FBT002 - a field of the form, given by name
    repair: bool = False,  # noqa: FBT001, FBT002 - as above
    regenerate: bool = False,  # noqa: FBT001, FBT002 - as above
    replace: bool = False,  # noqa: FBT001, FBT002 - as above
    max_credits: CreditCap = None,
    max_images: ImageCap = None,
    credentials: CredentialsChoice = None,
    at_once: Annotated[int, Field(ge=1, le=64)] = 32,
) -> AuditReport:
    """Verify that every image of a manifest is in its bucket, and restore missing images if that is allowed.

    Without repair and regenerate it sends two HEAD requests an image and changes nothing. With repair, images are
    restored from this host's spool, byte for byte, at no cost. With regenerate, the images that are still missing are
    generated again by a batch, with the same seeds and under the caps. Their bytes can differ from the manifest; the
    batch's own manifest has the new checksums.

    Args:
        manifest: The .jsonl manifest of a run: a path, s3://… or https://….
        bucket: s3://name/prefix, or a saved Image Bucket block or its name: the bucket of the images.
        deep: Download every image and verify its checksum. S3 may bill the traffic.
        repair: Put missing images and records back from this host's spool.
        regenerate: Pay for missing images that are not in the spool. Needs max_credits or max_images.
        replace: Move an object with a wrong checksum to replaced/ in the bucket, so that repair or regenerate can
            restore the image under its key.
        max_credits: A hard cap on what this run spends, in credits (2,000,000 to the US dollar).
        max_images: A hard cap on the number of images that this run pays for.
        credentials: A saved AIMLAPI Credentials block or its name, for regenerate. Empty: AIMLAPI_KEY of the
            environment.
        at_once: The most rows that are inspected at the same time.

    Returns:
        The findings and the repairs.

    Raises:
        ValueError: the settings contradict each other.
        TableError: the file can't be read, or is not a manifest.
        BucketError: the bucket or its keys are wrong.
        AuditFailed: images are still missing or wrong. Its `report` is the whole report.

    Example:
        ```python
        batch = await publish_batch("prompts.csv", "s3://images/catalogue")
        report = await audit_bucket(batch.manifest, "s3://images/catalogue", deep=True)
        ```
    """
    if regenerate and max_credits is None and max_images is None:
        raise ValueError("regenerate pays for every missing image: set max_credits or max_images as its cap")
    if replace and not (repair or regenerate):
        raise ValueError("replace only prepares a repair: set repair or regenerate as well")
    destination = await ImageBucket.resolve(bucket)
    await destination.check()
    account = await AimlApiCredentials.resolve(credentials) if regenerate else None
    with tempfile.NamedTemporaryFile("w", prefix="flux-audit-", suffix=".jsonl", encoding="utf-8") as table:
        audit = Audit(
            destination,
            table,
            deep=deep,
            repair=repair,
            replace=replace,
            account=account,
            run=PublishingRun(flow_run_id=flow_run.id, flow_run_name=flow_run.name),
            logger=get_run_logger(),
        )
        async with open_source(manifest, bucket=destination) as source:
            await for_each(read_manifest_items(source), audit.inspect, at_once=at_once)
        table.flush()
        get_run_logger().info("Found: %s", audit.report().summary())
        if audit.wanted:
            state: State[Any] = await publish_batch.with_options(flow_run_name=f"{len(audit.wanted)} missing")(
                table.name, bucket, credentials, max_credits=max_credits, max_images=max_images, return_state=True
            )
            audit.record_batch(await state.aresult(raise_on_failure=False), state.message)
    report = audit.report()
    await acreate_table_artifact(tabulate_audit(report), key="flux-audit", description=report.summary())
    if report.still_wrong:
        error = AuditFailed(report.summary(), report)
        return cast("AuditReport", Failed(message=error.message, data=error))
    return cast("AuditReport", Completed(message=report.summary(), data=report))
