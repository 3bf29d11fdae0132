"""Compare a manifest with its bucket and restore missing images."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from prefect import flow
from prefect.artifacts import acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage, PublishingRun
from flux_prefect.concurrency import for_each
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import AuditFailed, BatchFailed, FluxError, RepairImpossible, TableError
from flux_prefect.flows.form_types import BucketChoice, CredentialsChoice, CreditCap, ImageCap
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.manifest.audit import Finding, check_key, find_in_spool, inspect_published, set_aside
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.budget import describe_credits
from flux_prefect.tables.manifest_lines import read_records
from flux_prefect.tables.sources import Source, open_source

__all__ = ["AuditReport", "AuditedImage", "audit_bucket"]

_MAX_REPORTED = 100

Mended = Literal["put back from the spool", "published again"]


class AuditedImage(BaseModel):
    """An image that differs from the manifest, and the outcome of its repair."""

    model_config = ConfigDict(frozen=True)

    row: int = Field(description="The row's number in the table, from 1.")
    id: str = Field(description="The row's id.")
    key: str = Field(description="The image's key.")
    finding: Finding = Field(description="What was found.")
    mended: Mended | None = Field(default=None, description="How the image was restored; None if it was not.")
    message: str = Field(default="", description="What differs, or why the image was not restored.")


class AuditReport(BaseModel):
    """The findings of an audit, and its repairs."""

    model_config = ConfigDict(frozen=True)

    counts: dict[Finding, int] = Field(description="Number of images by finding.")
    mended: dict[Mended, int] = Field(default_factory=dict, description="Number of restored images by method.")
    unpublished: int = Field(default=0, description="Rows without an image in the manifest. They are not inspected.")
    problems: tuple[AuditedImage, ...] = Field(
        default=(), description="The first hundred images that were not ok; those that were not restored come first."
    )
    batch: BatchReport | None = Field(
        default=None, description="Report of the batch that generated images again; it has its own manifest."
    )

    @property
    def images(self) -> int:
        """Number of inspected images."""
        return sum(self.counts.values())

    @property
    def still_wrong(self) -> int:
        """Number of images that differ from the manifest and were not restored."""
        return self.images - self.counts.get("ok", 0) - sum(self.mended.values())

    def summary(self) -> str:
        """Summarize the findings, the repairs and their cost in one line."""
        found = ", ".join(f"{number:,} {finding}" for finding, number in sorted(self.counts.items(), key=_ok_first))
        line = f"{self.images:,} images: {found or 'none'}"
        line += "".join(f"; {number:,} {how}" for how, number in self.mended.items())
        if self.batch is not None:
            line += f", {describe_credits(self.batch.credits_used)}"
        return f"{line}; {self.still_wrong:,} still wrong" if self.still_wrong else line


def _by_row(image: AuditedImage) -> int:
    return image.row


def _ok_first(item: tuple[Finding, int]) -> tuple[bool, str]:
    return item[0] != "ok", item[0]


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
        audit = _Audit(destination, table, deep=deep, repair=repair, replace=replace, account=account)
        async with open_source(manifest, bucket=destination) as source:
            await for_each(_read_items(source), audit.inspect, at_once=at_once)
        table.flush()
        get_run_logger().info("Found: %s", audit.report().summary())
        if audit.wanted:
            state: State[Any] = await publish_batch.with_options(flow_run_name=f"{len(audit.wanted)} missing")(
                table.name, bucket, credentials, max_credits=max_credits, max_images=max_images, return_state=True
            )
            audit.record_batch(await state.aresult(raise_on_failure=False), state.message)
    report = audit.report()
    await acreate_table_artifact(_tabulate(report), key="flux-audit", description=report.summary())
    if report.still_wrong:
        error = AuditFailed(report.summary(), report)
        return cast("AuditReport", Failed(message=error.message, data=error))
    return cast("AuditReport", Completed(message=report.summary(), data=report))


class _Audit:
    """A running audit. Its memory is some 500 bytes for each image that is wrong, and none for others."""

    def __init__(
        self,
        bucket: ImageBucket,
        missing: IO[str],
        *,
        deep: bool,
        repair: bool,
        replace: bool,
        account: AimlApiCredentials | None,
    ) -> None:
        self.wanted: dict[str, list[AuditedImage]] = {}
        self._bucket = bucket
        self._missing = missing
        self._deep = deep
        self._repair = repair
        self._replace = replace
        self._account = account
        self._run = PublishingRun(flow_run_id=flow_run.id, flow_run_name=flow_run.name)
        self._counts: Counter[Finding] = Counter()
        self._mended: Counter[Mended] = Counter()
        self._unpublished = 0
        self._wrong: list[AuditedImage] = []
        self._right: list[AuditedImage] = []
        self._logger = get_run_logger()
        self._batch: BatchReport | None = None

    async def inspect(self, item: ItemRecord) -> None:
        """Inspect a row's images; restore missing ones from the spool or add them to the batch."""
        if not item.images:
            self._unpublished += 1
        wanted: list[AuditedImage] = []
        for image in item.images:
            inspection = await inspect_published(self._bucket, image, deep=self._deep)
            self._counts[inspection.finding] += 1
            if inspection.finding == "ok":
                continue
            found = AuditedImage(
                row=item.row, id=item.id, key=image.key, finding=inspection.finding, message=inspection.message
            )
            try:
                if await self._restore(found, item, image):
                    self._record_mended(found, "put back from the spool")
                else:
                    wanted.append(found)
            except FluxError as error:
                self._record_wrong(found, error.message)
        if wanted and item.request is not None:
            self.wanted[item.id] = wanted
            self._missing.write(json.dumps({**item.request.payload(), "id": item.id}) + "\n")

    async def _restore(self, found: AuditedImage, item: ItemRecord, image: PublishedImage) -> bool:
        """Restore an image from the spool. Returns False if it must be generated; its key is then free.

        Raises:
            RepairImpossible, BucketError: neither is possible or allowed.
        """
        if found.finding == "unreadable" or not (self._repair or self._account):
            raise RepairImpossible("")
        if found.finding == "wrong_checksum" and not self._replace:
            raise RepairImpossible("the object was not moved: set replace")
        if self._repair:
            try:
                file = await find_in_spool(self._bucket, image)
            except RepairImpossible:
                if self._account is None:
                    raise
            else:
                await self._free_key(found, image)
                if (await self._bucket.publish(file, self._run)).sha256 != image.sha256:
                    raise RepairImpossible("another object was written under its key meanwhile")
                return True
        self._check_generable(found, item, image)
        await self._free_key(found, image)
        return False

    def _check_generable(self, found: AuditedImage, item: ItemRecord, image: PublishedImage) -> None:
        if found.finding == "missing_sidecar":
            raise RepairImpossible(
                "no spool of this host has its record, and an image that exists is not paid for again"
            )
        if self._account is None or item.request is None or item.request.seed is None:
            raise RepairImpossible("the manifest does not have its request")
        if item.request.fingerprint(self._account.base_url) != image.fingerprint:
            raise RepairImpossible("it was generated at another endpoint than that of the credentials")
        check_key(self._bucket, item.request, image)

    async def _free_key(self, found: AuditedImage, image: PublishedImage) -> None:
        if found.finding == "wrong_checksum":
            kept = await set_aside(self._bucket, image)
            self._logger.warning("The object of %s was moved to %s", image.key, kept)

    def record_batch(self, result: Any, message: str | None) -> None:
        """Record the outcomes of the images that the batch generated again."""
        batch = result.report if isinstance(result, BatchFailed) else result
        if isinstance(batch, BatchReport):
            self._batch = batch
            for item in batch.read():
                there = {image.key for image in item.images}
                for found in self.wanted.pop(item.id, []):
                    if found.key in there:
                        self._record_mended(found, "published again")
                    else:
                        self._record_wrong(found, item.message or item.status)
        for found in itertools.chain.from_iterable(self.wanted.values()):
            self._record_wrong(found, message or "the batch did not finish")

    def report(self) -> AuditReport:
        """Return the findings and repairs so far."""
        return AuditReport(
            counts=dict(self._counts),
            mended=dict(self._mended),
            unpublished=self._unpublished,
            problems=(*sorted(self._wrong, key=_by_row), *sorted(self._right, key=_by_row))[:_MAX_REPORTED],
            batch=self._batch,
        )

    def _record_mended(self, found: AuditedImage, how: Mended) -> None:
        self._mended[how] += 1
        if len(self._right) < _MAX_REPORTED:
            self._right.append(found.model_copy(update={"mended": how}))

    def _record_wrong(self, found: AuditedImage, reason: str) -> None:
        if len(self._wrong) < _MAX_REPORTED:
            message = "; ".join(part for part in (found.message, reason) if part)
            self._wrong.append(found.model_copy(update={"message": message}))


def _read_items(source: Source) -> Iterator[ItemRecord]:
    if source.format != "jsonl":
        raise TableError(f"{source.name} is not a .jsonl manifest: use the .jsonl file beside it.")
    with source.open() as file:
        for record in read_records(file, source.name):
            try:
                yield ItemRecord.model_validate(record)
            except ValidationError as error:
                raise TableError(f"{source.name}: the record of row {record['row']} is broken ({error}).") from error


def _tabulate(report: AuditReport) -> list[dict[str, Any]]:
    sums = [{"row": "", "id": "all", "found": name, "message": f"{count:,}"} for name, count in report.counts.items()]
    problems = [
        {"row": each.row, "id": each.id, "found": each.finding, "message": each.mended or each.message or each.key}
        for each in report.problems
    ]
    return [*sums, *problems]
