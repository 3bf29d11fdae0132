"""An audit of a manifest against its bucket, image by image, with repairs and a report."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage, PublishingRun
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BatchFailed, FluxError, RepairImpossible, TableError
from flux_prefect.manifest.inspection import Finding, check_key, find_in_spool, inspect_published, set_aside
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.budget import describe_credits
from flux_prefect.tables.manifest_lines import read_records
from flux_prefect.tables.sources import Source

__all__ = ["Audit", "AuditReport", "AuditedImage", "read_manifest_items", "tabulate_audit"]

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


class Audit:
    """A running audit. Its memory is some 500 bytes for each image that is wrong, and none for others.

    Attributes:
        wanted: The images to be generated again, by row id.

    Args:
        bucket: Where the images are.
        missing: Gets the requests of images to be generated again, as JSON Lines.
        deep: Read the images' bytes as well.
        repair: Restore images from this host's spool.
        replace: Move what lies under a wrong image's key, so that the image can be restored.
        account: Pays for images that are generated again; None to pay for none.
        run: The run that restores, for the images' records.
        logger: Of the run.
    """

    def __init__(  # noqa: PLR0913 - keyword-only from the third on
        self,
        bucket: ImageBucket,
        missing: IO[str],
        *,
        deep: bool,
        repair: bool,
        replace: bool,
        account: AimlApiCredentials | None,
        run: PublishingRun,
        logger: logging.Logger | logging.LoggerAdapter[Any],
    ) -> None:
        self.wanted: dict[str, list[AuditedImage]] = {}
        self._bucket = bucket
        self._missing = missing
        self._deep = deep
        self._repair = repair
        self._replace = replace
        self._account = account
        self._run = run
        self._counts: Counter[Finding] = Counter()
        self._mended: Counter[Mended] = Counter()
        self._unpublished = 0
        self._wrong: list[AuditedImage] = []
        self._right: list[AuditedImage] = []
        self._logger = logger
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


def read_manifest_items(source: Source) -> Iterator[ItemRecord]:
    """Yield the records of a manifest.

    Raises:
        TableError: the source is no .jsonl manifest, or a record is broken.
    """
    if source.format != "jsonl":
        raise TableError(f"{source.name} is not a .jsonl manifest: use the .jsonl file beside it.")
    with source.open() as file:
        for record in read_records(file, source.name):
            try:
                yield ItemRecord.model_validate(record)
            except ValidationError as error:
                raise TableError(f"{source.name}: the record of row {record['row']} is broken ({error}).") from error


def tabulate_audit(report: AuditReport) -> list[dict[str, Any]]:
    """The counts and the first problems as rows of a table artifact."""
    sums = [{"row": "", "id": "all", "found": name, "message": f"{count:,}"} for name, count in report.counts.items()]
    problems = [
        {"row": each.row, "id": each.id, "found": each.finding, "message": each.mended or each.message or each.key}
        for each in report.problems
    ]
    return [*sums, *problems]
