"""Compare a manifest with its bucket, and bring back what is missing."""

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
    """An image that was not as the manifest says, and what became of it."""

    model_config = ConfigDict(frozen=True)

    row: int = Field(description="The row's place in the table, from 1.")
    id: str = Field(description="The row's id.")
    key: str = Field(description="The image's key.")
    finding: Finding = Field(description="What was found.")
    mended: Mended | None = Field(default=None, description="How it came back; None where it did not.")
    message: str = Field(default="", description="What differs, or why it did not come back.")


class AuditReport(BaseModel):
    """What an audit found, and what of it is mended."""

    model_config = ConfigDict(frozen=True)

    counts: dict[Finding, int] = Field(description="How many images were found so.")
    mended: dict[Mended, int] = Field(default_factory=dict, description="How many came back so.")
    unpublished: int = Field(
        default=0, description="Rows for which the manifest has no image. They are not looked for."
    )
    problems: tuple[AuditedImage, ...] = Field(
        default=(), description="The first hundred that were not ok, those that still are not before the others."
    )
    batch: BatchReport | None = Field(default=None, description="Of what was generated again; with its own manifest.")

    @property
    def images(self) -> int:
        """How many were looked at."""
        return sum(self.counts.values())

    @property
    def still_wrong(self) -> int:
        """How many are not as the manifest says, and did not come back."""
        return self.images - self.counts.get("ok", 0) - sum(self.mended.values())

    def summary(self) -> str:
        """One line: what was found, what came back, what it cost."""
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
    # The last parts alone: the query of a signed address is a secret.
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
    """Look for every image of a manifest in its bucket, and bring back what is missing where that is allowed.

    Without a repair it costs two HEADs an image and changes nothing. What comes back comes from the spool of this
    host, byte for byte, at no cost; else, where allowed, from a batch of what is missing, with the same seeds and under
    the caps. What that published again can have other bytes than the manifest says; its own manifest has theirs.

    Args:
        manifest: The .jsonl manifest of a run: a path, s3://… or https://….
        bucket: s3://name/prefix, or a saved Image Bucket block or its name: the one that was published to.
        deep: Read every image's bytes as well. The traffic may cost.
        repair: Put missing images and records back from this host's spool.
        regenerate: Pay for what is missing and not in the spool. Needs max_credits or max_images.
        replace: Take away what stands in the place of an image with a wrong checksum, so that repair or regenerate
            can bring the right one. It is kept under replaced/ in the bucket.
        max_credits: A hard cap on what this run spends, in credits (2,000,000 to the US dollar).
        max_images: A hard cap on the images that this run pays for.
        credentials: A saved AIMLAPI Credentials block or its name, for regenerate. Empty: AIMLAPI_KEY of the
            environment.
        at_once: How many rows are looked at at once.

    Returns:
        What was found and what of it came back.

    Raises:
        ValueError: the settings contradict each other.
        TableError: the manifest can't be read, or is none.
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
        raise ValueError("replace makes room for a repair: set repair or regenerate as well")
    destination = await ImageBucket.resolve(bucket)
    await destination.check()
    account = await AimlApiCredentials.resolve(credentials) if regenerate else None
    with tempfile.NamedTemporaryFile("w", prefix="flux-audit-", suffix=".jsonl", encoding="utf-8") as table:
        audit = _Audit(destination, table, deep=deep, repair=repair, replace=replace, account=account)
        async with open_source(manifest, bucket=destination) as source:
            await for_each(_read_items(source), audit.look_at, at_once=at_once)
        table.flush()
        get_run_logger().info("Found: %s", audit.report().summary())
        if audit.wanted:
            state: State[Any] = await publish_batch.with_options(flow_run_name=f"{len(audit.wanted)} missing")(
                table.name, bucket, credentials, max_credits=max_credits, max_images=max_images, return_state=True
            )
            audit.take(await state.aresult(raise_on_failure=False), state.message)
    report = audit.report()
    await acreate_table_artifact(_tabulate(report), key="flux-audit", description=report.summary())
    if report.still_wrong:
        error = AuditFailed(report.summary(), report)
        return cast("AuditReport", Failed(message=error.message, data=error))
    return cast("AuditReport", Completed(message=report.summary(), data=report))


class _Audit:
    """An audit that is running. Memory: what is wrong, some 500 bytes an image; nothing for what is right."""

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

    async def look_at(self, item: ItemRecord) -> None:
        """Inspect a row's images, and put back or ask for what is not there."""
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
                if await self._brought_back(found, item, image):
                    self._note_mended(found, "put back from the spool")
                else:
                    wanted.append(found)
            except FluxError as error:
                self._note_wrong(found, error.message)
        if wanted and item.request is not None:
            self.wanted[item.id] = wanted
            self._missing.write(json.dumps({**item.request.payload(), "id": item.id}) + "\n")

    async def _brought_back(self, found: AuditedImage, item: ItemRecord, image: PublishedImage) -> bool:
        """Whether the image is back; False where it is to be generated, and its key is free for it.

        Raises:
            RepairImpossible, BucketError: neither is possible or allowed.
        """
        if found.finding == "unreadable" or not (self._repair or self._account):
            raise RepairImpossible("")
        if found.finding == "wrong_checksum" and not self._replace:
            raise RepairImpossible("it stays, as replace is not set")
        if self._repair:
            try:
                file = await find_in_spool(self._bucket, image)
            except RepairImpossible:
                if self._account is None:
                    raise
            else:
                await self._free(found, image)
                if (await self._bucket.publish(file, self._run)).sha256 != image.sha256:
                    raise RepairImpossible("something else took its key meanwhile")
                return True
        self._check_generable(found, item, image)
        await self._free(found, image)
        return False

    def _check_generable(self, found: AuditedImage, item: ItemRecord, image: PublishedImage) -> None:
        if found.finding == "missing_sidecar":
            raise RepairImpossible("its record is in no spool here, and an image that is there is not paid for again")
        if self._account is None or item.request is None or item.request.seed is None:
            raise RepairImpossible("its request is not in the manifest")
        if item.request.fingerprint(self._account.base_url) != image.fingerprint:
            raise RepairImpossible("it was made at another endpoint than the credentials are for")
        check_key(self._bucket, item.request, image)

    async def _free(self, found: AuditedImage, image: PublishedImage) -> None:
        if found.finding == "wrong_checksum":
            kept = await set_aside(self._bucket, image)
            self._logger.warning("What stood under %s is kept under %s", image.key, kept)

    def take(self, result: Any, message: str | None) -> None:
        """Note what became of the images that were to be generated again."""
        batch = result.report if isinstance(result, BatchFailed) else result
        if isinstance(batch, BatchReport):
            self._batch = batch
            for item in batch.read():
                there = {image.key for image in item.images}
                for found in self.wanted.pop(item.id, []):
                    if found.key in there:
                        self._note_mended(found, "published again")
                    else:
                        self._note_wrong(found, item.message or item.status)
        for found in itertools.chain.from_iterable(self.wanted.values()):
            self._note_wrong(found, message or "the batch did not come to its end")

    def report(self) -> AuditReport:
        """What was found and mended so far."""
        return AuditReport(
            counts=dict(self._counts),
            mended=dict(self._mended),
            unpublished=self._unpublished,
            problems=(*sorted(self._wrong, key=_by_row), *sorted(self._right, key=_by_row))[:_MAX_REPORTED],
            batch=self._batch,
        )

    def _note_mended(self, found: AuditedImage, how: Mended) -> None:
        self._mended[how] += 1
        if len(self._right) < _MAX_REPORTED:
            self._right.append(found.model_copy(update={"mended": how}))

    def _note_wrong(self, found: AuditedImage, reason: str) -> None:
        if len(self._wrong) < _MAX_REPORTED:
            message = "; ".join(part for part in (found.message, reason) if part)
            self._wrong.append(found.model_copy(update={"message": message}))


def _read_items(source: Source) -> Iterator[ItemRecord]:
    if source.format != "jsonl":
        raise TableError(f"{source.name} is no .jsonl manifest: give the one that stands beside it.")
    with source.open() as file:
        for record in read_records(file, source.name):
            try:
                yield ItemRecord.model_validate(record)
            except ValidationError as error:
                raise TableError(f"{source.name}: the record of row {record['row']} is broken ({error}).") from error


def _tabulate(report: AuditReport) -> list[dict[str, Any]]:
    sums = [{"row": "", "id": "all", "found": name, "told": f"{count:,}"} for name, count in report.counts.items()]
    told = [
        {"row": each.row, "id": each.id, "found": each.finding, "told": each.mended or each.message or each.key}
        for each in report.problems
    ]
    return [*sums, *told]
