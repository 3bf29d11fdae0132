"""The pipeline of one request: find, generate, download, upload, and replace what went stale on the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from prefect.blocks.core import Block
from prefect.tasks import Task
from prefect.utilities.annotations import quote

from flux_prefect.api.models import Generation, ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.leases import BucketLeases
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.concurrency import run_in_thread
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import CallOutcome, metered
from flux_prefect.errors import (
    Billed,
    BucketError,
    BucketUnavailable,
    BudgetExhausted,
    ContentFlagged,
    FluxError,
    ImageChanged,
    ImageGone,
    SpoolUnreadable,
    UnexpectedError,
)
from flux_prefect.host.locks import HostLockManager
from flux_prefect.host.retention import shrink
from flux_prefect.host.spool import ImageFile, PaidCall, Spool
from flux_prefect.tasks import download_image, find_published, generate_image, upload_to_s3

__all__ = [
    "Density",
    "ImageOutcome",
    "Production",
    "Status",
    "StepRunner",
    "check_ready",
    "produce_image",
    "run_as_task",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_logger = logging.getLogger(__name__)

Density = Literal["steps", "chunks"]
"""How many task runs a batch has.

`steps`: a task run for each step of each row, three an image. `chunks`: one task run for a hundred rows.
"""

_LOCKS = HostLockManager()
_GENERATE_AGAIN = generate_image.with_options(refresh_cache=True)
_DOWNLOAD_AGAIN = download_image.with_options(refresh_cache=True)


class Status(str, Enum):
    """How one image ended."""

    PUBLISHED = "published"
    UNCHANGED = "unchanged"
    FLAGGED = "flagged"
    SKIPPED_BUDGET = "skipped_budget"
    FAILED = "failed"


@dataclass(frozen=True)
class ImageOutcome:
    """How one image of a request ended."""

    index: int
    image: PublishedImage | None = None
    error: FluxError | None = None

    @property
    def status(self) -> Status:
        """Whether it was published by this run or before, flagged by the service, skipped for the cap, or failed."""
        if self.image is not None:
            return Status.PUBLISHED if self.image.created else Status.UNCHANGED
        if isinstance(self.error, ContentFlagged):
            return Status.FLAGGED
        return Status.SKIPPED_BUDGET if isinstance(self.error, BudgetExhausted) else Status.FAILED


@dataclass
class Production:
    """The outcome of one request: its images and its paid calls.

    Attributes:
        request: What was asked for.
        fingerprint: The request's fingerprint at its endpoint.
        outcomes: How each image ended, by its index.
        calls: The paid calls of this run, including refused and lost ones.
        open_calls: All calls for this request, of this run and earlier ones of this host, that were or may have been
            paid for without delivering an image.
        regenerated: Whether a cached answer's URL had died and the image was paid for anew.
        refetched: The number of images that were downloaded anew, as their cached file was gone or changed.
    """

    request: ImageRequest
    fingerprint: str
    outcomes: dict[int, ImageOutcome] = field(default_factory=dict)
    calls: list[CallOutcome] = field(default_factory=list)
    open_calls: list[PaidCall] = field(default_factory=list)
    regenerated: bool = False
    refetched: int = 0

    @property
    def credits_used(self) -> float:
        """The reported cost of this run's calls, in credits."""
        return sum(call.credits_used or 0 for call in self.calls)

    @property
    def unpriced_calls(self) -> int:
        """How many billed calls have no reported cost, or one of 0."""
        return sum(call.billed is Billed.YES and not call.credits_used for call in self.calls)

    @property
    def unbilled_calls(self) -> int:
        """How many calls of this run were refused or never left, and cost nothing."""
        return sum(call.billed is Billed.NO for call in self.calls)

    @property
    def images(self) -> list[ImageOutcome]:
        """The outcomes in the order of the images."""
        return [self.outcomes[index] for index in sorted(self.outcomes)]

    @property
    def missing(self) -> list[int]:
        """The images without an outcome yet."""
        return [index for index in range(self.request.num_images) if index not in self.outcomes]

    @property
    def error(self) -> FluxError | None:
        """The first failed image's error."""
        return next((outcome.error for outcome in self.images if outcome.error is not None), None)

    def paid_for(self, generation: Generation) -> bool:
        """Whether this run, not an earlier one, paid for the generation."""
        return any(call.client_request_id == generation.client_request_id for call in self.calls)


async def check_ready(bucket: ImageBucket) -> None:
    """Verify that the spool, the locks and the bucket can be used, before anything is paid for. For the start of a run.

    Also removes half-written files of dead processes from the spool, and published images whose time there is over.

    Raises:
        SpoolUnwritable, LocksUnusable: the spool or the lock folder can't be used.
        BucketError: the bucket or its keys are wrong.

    Example:
        ```python
        await check_ready(bucket)
        ```
    """
    spool = Spool()
    spool.prepare()
    spool.sweep()
    _LOCKS.prepare()
    await run_in_thread(shrink, spool, _LOCKS)
    await bucket.check()


class StepRunner(Protocol):
    """How the pipeline runs a step: `run_as_task`, or `inline.run_inline`."""

    def __call__(
        self, task: Task[_P, Coroutine[Any, Any, _R]], *args: _P.args, **kwargs: _P.kwargs
    ) -> Coroutine[Any, Any, _R]:
        """Return or raise what the task does."""
        ...


async def run_as_task(task: Task[_P, Coroutine[Any, Any, _R]], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Run a step as a task run of its own.

    Example:
        ```python
        generation = await run_as_task(generate_image, request, credentials)
        ```
    """
    # Prefect looks for futures in every field of every argument, four times a task run. A block has none.
    quoted: Any = (quote(argument) if isinstance(argument, Block) else argument for argument in args)
    return await task(*quoted, **kwargs)


async def produce_image(
    request: ImageRequest,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    *,
    run: StepRunner = run_as_task,
) -> Production:
    """Publish every image of a request, spending as little as possible.

    Runs one at a time on a host for one request, across processes: the second finds what the first published. If the
    bucket has `lease_seconds`, it runs one at a time on all hosts that publish to the bucket, and an answer whose host
    died before the upload is used by the next one. An image that is in the
    bucket already costs a HEAD. A cached answer whose URL has died is paid for anew, and a cached file that is gone is
    fetched anew, each at most once. A missing bucket is found before anything is paid for. Failures of images are
    outcomes, not exceptions.

    Args:
        request: What to make.
        bucket: Where to publish it.
        credentials: The account that pays.
        run: How the steps are run. With `run_inline` there are no task runs; keys, records, locks and retries are the
            same, so either finds what the other has kept.

    Raises:
        ValueError: the request has no seed (`seeds.with_seed` draws one).

    Example:
        ```python
        production = await produce_image(request, bucket, credentials)
        for outcome in production.images:
            print(outcome.status.value, outcome.error or outcome.image.uri)
        ```
    """
    production = Production(request, request.fingerprint(credentials.base_url))
    with metered() as production.calls:
        async with _LOCKS.hold(f"produce-{production.fingerprint}"), credentials.open_client():
            await _Producer(production, bucket, credentials, run).produce()
            with suppress(SpoolUnreadable):  # the outcome counts, and the next call is refused before it is paid for
                production.open_calls = Spool().open_calls(production.fingerprint)
    return production


@dataclass(frozen=True)
class _Producer:
    """The steps of one request, in order."""

    production: Production
    bucket: ImageBucket
    credentials: AimlApiCredentials
    run: StepRunner

    async def produce(self) -> None:
        # Also right after a plan has looked: an earlier holder of the lock may have published from another spool.
        await _together(self._find(index) for index in range(self.production.request.num_images))
        missing = self.production.missing
        if not missing:
            return
        if self.bucket.lease_seconds is None:
            await self._make(missing)
        else:
            await self._make_alone(self.bucket.lease_seconds)

    async def _make_alone(self, lease_seconds: float) -> None:
        """Make the missing images under a lease, so that no other machine does."""
        production = self.production
        try:
            async with BucketLeases(self.bucket, lease_seconds).hold(production.fingerprint):
                await _together(self._find(index) for index in production.missing)  # its last holder may have
                if missing := production.missing:
                    await self._make(missing)
        except BucketError as error:  # there is no lease, so nothing is paid
            self._fail(production.missing, error)

    async def _find(self, index: int) -> None:
        try:
            image = await self._look(index)
        except Exception as error:  # noqa: BLE001 - any error: nothing is paid for this image
            self._fail([index], error)
        else:
            if image is not None:
                self.production.outcomes[index] = ImageOutcome(index, image=image)

    async def _look(self, index: int) -> PublishedImage | None:
        request = self.production.request
        try:
            return await self.bucket.find(request, self.production.fingerprint, index)
        except BucketUnavailable:
            # Now it is worth a task run: its retries are Prefect's, and visible in its UI.
            return await self.run(find_published, request, self.bucket, self.credentials, index)

    async def _make(self, wanted: list[int]) -> None:
        production = self.production
        try:
            await self.bucket.prove_writable()
            generation = await self.run(generate_image, production.request, self.credentials, None, self._shared)
            await self._deliver_all(generation, wanted)
            gone = [index for index in wanted if isinstance(production.outcomes[index].error, ImageGone)]
            if gone and not production.paid_for(generation):
                wanted = gone
                production.regenerated = True
                generation = await self.run(
                    _GENERATE_AGAIN, production.request, self.credentials, generation.client_request_id, self._shared
                )
                await self._deliver_all(generation, gone)
        except Exception as error:  # noqa: BLE001 - any error of a generation fails all its images
            self._fail(wanted, error)

    @property
    def _shared(self) -> ImageBucket | None:
        """The bucket, if other hosts look for answers in it."""
        return None if self.bucket.lease_seconds is None else self.bucket

    async def _deliver_all(self, generation: Generation, indexes: list[int]) -> None:
        await _together(self._deliver(generation, index) for index in indexes)

    async def _deliver(self, generation: Generation, index: int) -> None:
        try:
            file = await self.run(download_image, generation, self.credentials, index, self.bucket)
            if not file.is_whole():
                file = await self._fetch_again(generation, index)
            try:
                image = await self.run(upload_to_s3, file, self.bucket)
            except ImageChanged:
                file.path.unlink(missing_ok=True)
                image = await self.run(upload_to_s3, await self._fetch_again(generation, index), self.bucket)
        except Exception as error:  # noqa: BLE001 - any error: the other images' cost is still reported
            self._fail([index], error)
        else:
            self.production.outcomes[index] = ImageOutcome(index, image=image)

    async def _fetch_again(self, generation: Generation, index: int) -> ImageFile:
        file = await self.run(_DOWNLOAD_AGAIN, generation, self.credentials, index, self.bucket)
        self.production.refetched += 1
        return file

    def _fail(self, indexes: list[int], error: Exception) -> None:
        for index in indexes:
            self.production.outcomes[index] = ImageOutcome(index, error=_typed(error))


def _typed(error: Exception) -> FluxError:
    if isinstance(error, FluxError):
        return error
    _logger.error("Unexpected error", exc_info=error)
    return UnexpectedError(f"{type(error).__name__}: {error}. It is a defect: its traceback is in the log.")


async def _together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all coroutines to their ends, then raise the first exception, if any."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
