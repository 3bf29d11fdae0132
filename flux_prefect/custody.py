"""Custody of paid answers: lock, look, note, pay, keep, parse, in this order, for every request.

Needs no Prefect; `tasks` wraps it. Every place that may hold the answer is looked at before anything is paid for,
and every answer is kept before it is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from flux_prefect.api.answers import RawAnswer
from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.downloads import DownloadedImage
from flux_prefect.api.images import ExpectedShape
from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.leases import BucketLeases, Lease, current_lease
from flux_prefect.bucket.published_image import PublishedImage, PublishingRun, read_generation
from flux_prefect.bucket.shared_answers import SharedAnswers
from flux_prefect.concurrency import run_in_thread, run_to_end
from flux_prefect.errors import (
    Billed,
    BucketError,
    ContentFlagged,
    EmptyGeneration,
    ImageGone,
    NotAnImage,
    RepeatLimitReached,
    ServiceError,
    SpoolUnreadable,
)
from flux_prefect.host.locks import HostLockManager
from flux_prefect.host.retention import shrink_at_times
from flux_prefect.host.spool import ImageFile, KeptAnswer, PaidCall, Spool, black_image
from flux_prefect.money.budget import Budget, current_budget, describe_credits
from flux_prefect.money.reconciliation import reconcile
from flux_prefect.settings import current_settings

_LOCKS = HostLockManager()

__all__ = [
    "CallOutcome",
    "Order",
    "Results",
    "download",
    "generate",
    "metered",
    "obtain",
    "publish",
    "recover",
    "release",
    "take_up",
]


@dataclass(frozen=True)
class CallOutcome:
    """How one paid call ended, as collected by `metered`."""

    client_request_id: str
    billed: Billed
    credits_used: float | None


_meter: ContextVar[list[CallOutcome] | None] = ContextVar("meter", default=None)


@contextmanager
def metered() -> Iterator[list[CallOutcome]]:
    """Collect the outcomes of all paid calls that end inside the block."""
    calls: list[CallOutcome] = []
    token = _meter.set(calls)
    try:
        yield calls
    finally:
        _meter.reset(token)


@dataclass(frozen=True)
class Order:
    """Options of one generation.

    Attributes:
        refresh: Pay anew, regardless of any kept answer.
        replacing: The call whose answer has a dead URL. Pay anew only if that answer is still the kept one.
        task_run_id: The Prefect task run that asks.
    """

    refresh: bool = False
    replacing: str | None = None
    task_run_id: str | None = None


_PLAIN = Order()


async def generate(
    request: ImageRequest,
    client: AimlApiClient,
    spool: Spool,
    *,
    order: Order = _PLAIN,
    answers: SharedAnswers | None = None,
) -> Generation:
    """Pay for one call and keep its answer.

    The call is noted in the spool before it goes out. The body of a success is kept there before it is parsed and
    before any slot of a limit is released, also if the caller is cancelled meanwhile: the host always has a record of
    what was paid for, or may have been.

    Args:
        request: What to make.
        client: Sends the call.
        spool: Keeps the answer.
        order: The task run that pays and the call whose dead answer this one replaces, for the records.
        answers: Where the answer is kept for other hosts as well.

    Raises:
        ServiceError: its `billed` says what it means for money.
        BudgetExhausted: nothing was sent, as it would pass the cap of the enclosing `spending_from`.
        RunStopped: nothing was sent, as that budget was closed.
        LeaseLost: nothing was sent, as the lease of the enclosing `BucketLeases.hold` is lost.
        SpoolUnwritable: nothing was sent.
        BucketError: nothing was sent, as the run's ledger can't be written for other hosts.
    """
    budget = current_budget() or Budget(default_price=current_settings().credits_per_image)
    lease = current_lease()
    reservation = await budget.reserve(request)
    call = PaidCall(
        client_request_id=reservation.call,
        fingerprint="unseeded" if request.seed is None else request.fingerprint(client.base_url),
        endpoint=client.base_url,
        sent_at=datetime.now(timezone.utc),
        task_run_id=order.task_run_id,
        sends=0,
    )
    shared_as = None if answers is None else answers.uri_of(call.fingerprint)
    kept: KeptAnswer | None = None
    kept_as: Path | None = None

    async def keep(answer: RawAnswer) -> None:
        nonlocal kept, kept_as
        kept = KeptAnswer(call=call, request=request, answer=answer, replaces=order.replacing, shared_as=shared_as)
        with suppress(OSError):  # a full disk: only the parsed answer and Prefect's results have it
            kept_as = await run_to_end(spool.keep_answer, kept)

    sent, billed, credits_used = False, Billed.NO, None

    async def note() -> None:
        nonlocal call, sent, billed
        _check_allowed(budget, lease)  # it may have been closed while the call waited for its turn
        # Now, after any wait for its turn.
        call = call.model_copy(update={"sent_at": datetime.now(timezone.utc), "sends": call.sends + 1})
        await reservation.announce(call)
        _check_allowed(budget, lease)
        reservation.note_sent(call)
        spool.open_call(call)
        sent, billed = True, Billed.UNKNOWN  # until there is an answer

    def take_note_back() -> None:
        nonlocal billed
        spool.close_call(call)
        reservation.note_refused()
        billed = Billed.NO

    delivered = False
    try:
        generation = await client.generate(
            request,
            client_request_id=call.client_request_id,
            before_send=note,
            after_refusal=take_note_back,
            on_answer=keep,
        )
        billed, credits_used, delivered = Billed.YES, generation.credits_used, True
    except ServiceError as error:
        billed, credits_used = error.billed, error.credits_used
        if error.billed is Billed.NO:
            spool.close_call(call)
            spool.drop_answer(call.fingerprint, call.client_request_id)
        else:
            spool.leave_open(call, error)
            _name_kept_answer(error, kept_as)
        raise
    finally:
        if sent:
            _count(call, billed, credits_used)
        reservation.settle(billed, credits_used, delivered=delivered)
        await _share(kept, billed, answers)
    generation = generation.model_copy(update={"replaces": order.replacing, "shared_as": shared_as})
    return await run_to_end(_keep, call, generation, spool)


def _check_allowed(budget: Budget, lease: Lease | None) -> None:
    budget.check_open()
    if lease is not None:
        lease.check()


async def _share(kept: KeptAnswer | None, billed: Billed, answers: SharedAnswers | None) -> None:
    if kept is not None and answers is not None and billed is not Billed.NO:
        await answers.keep(kept)


class Results(Protocol):
    """Another place of an answer: Prefect's stored result of the calling task."""

    async def read(self) -> Generation | None:
        """Read the result, or return None.

        Raises:
            ResultStoreUnreadable: it may be there and can't be read.
        """
        ...

    async def write(self, generation: Generation) -> None:
        """Store the result, where the next caller looks for it."""
        ...


async def obtain(  # noqa: PLR0913 - what is asked for, and every place that may have it
    request: ImageRequest,
    client: AimlApiClient,
    spool: Spool,
    order: Order,
    *,
    results: Results | None = None,
    bucket: ImageBucket | None = None,
) -> tuple[Generation, bool]:
    """Return the generation of a request, and whether this call paid for it.

    Runs one at a time on a host for one fingerprint, from the look until the answer is stored. Looks at
    Prefect's result, the spool's records and the answers that were never parsed. A request without a seed is paid for
    each time.

    With a bucket it looks first for the published images, then for the answer of another host, and keeps its own
    answer there before the next one looks. If the bucket has `lease_seconds`, it runs one at a time on all hosts; else
    two hosts at the same moment may both pay. Inside `BucketLeases.hold` of the fingerprint, whose holder has looked
    for published images, it looks for answers alone.

    Raises:
        RepeatLimitReached: answers to this request were lost before; nothing was sent.
        ResultStoreUnreadable, SpoolUnreadable, BucketError: the answer may be there and can't be read; nothing was
            sent.
        ImageGone: the answer to be replaced was itself a replacement that was never fetched; nothing was sent.
        ServiceError, BudgetExhausted, RunStopped, LeaseLost, SpoolUnwritable: as `generate`.
    """
    if request.seed is None:
        return await generate(request, client, spool, order=order), True
    purchase = _Purchase(request, request.fingerprint(client.base_url), client, spool, order, results, bucket)
    generation, paid = await purchase.make()
    if not paid:
        _settle_by(generation)
    return generation, paid


@dataclass(frozen=True)
class _Purchase:
    """The way to the generation of one request with a seed: every place that may have it, then the service."""

    request: ImageRequest
    fingerprint: str
    client: AimlApiClient
    spool: Spool
    order: Order
    results: Results | None
    bucket: ImageBucket | None

    async def make(self) -> tuple[Generation, bool]:
        if self.bucket is None:
            return await self._make_on_this_host()
        if self.bucket.lease_seconds is None:
            return await self._make_among_hosts(self.bucket, nullcontext())
        leases = BucketLeases(self.bucket, self.bucket.lease_seconds)
        if leases.is_held(self.fingerprint):
            return await self._make_on_this_host()
        return await self._make_among_hosts(self.bucket, leases.hold(self.fingerprint))

    async def _make_among_hosts(
        self, bucket: ImageBucket, lease: AbstractAsyncContextManager[object]
    ) -> tuple[Generation, bool]:
        published = await self._read_back(bucket)
        if published is None:
            # The lock and the lease of `produce_image`, in its order.
            async with _LOCKS.hold(f"produce-{self.fingerprint}"), lease:
                published = await self._read_back(bucket)  # their last holder may have published
                if published is None:
                    return await self._make_on_this_host()
        return published, False

    async def _read_back(self, bucket: ImageBucket) -> Generation | None:
        """The generation whose images are all published, from the record of one of them."""
        if self._is_forced:
            return None
        images: list[PublishedImage] = []
        for index in range(self.request.num_images):
            image = await bucket.find(self.request, self.fingerprint, index)
            if image is None:
                return None
            images.append(image)
        record = await bucket.read_record(images[0])
        try:
            return read_generation(record or {}, images, self.request)
        except (KeyError, ValueError) as error:
            raise BucketError(
                f"{images[0].uri} is published, so nothing is paid for, and its record {images[0].sidecar_key} is gone "
                "or broken: restore it by flux-prefect audit, or use produce_image, which needs no record."
            ) from error

    async def _make_on_this_host(self) -> tuple[Generation, bool]:
        async with _LOCKS.hold(f"generate-{self.fingerprint}"):
            kept = await self._look()
            if kept is not None and kept.client_request_id != self.order.replacing:
                return kept, False
            if kept is not None and kept.replaces is not None:
                raise ImageGone(
                    f"The URL of {self.request.label!r} died before it was fetched, and so did that of the answer that "
                    "replaced it: nothing more is paid for it. Find out why its host can't be reached in time, then "
                    "generate with refresh_cache=True."
                )
            return await self._pay(), True

    @property
    def _is_forced(self) -> bool:
        return self.order.refresh and self.order.replacing is None

    async def _look(self) -> Generation | None:
        """The answer to use, else the one that is to be replaced, if it is there."""
        if self._is_forced:
            return None
        kept = recover(self.request, self.client.base_url, self.spool)
        if kept is None and self.results is not None:
            kept = await self.results.read()
        elif kept is not None and self.results is not None:
            await self.results.write(kept)
        if self.bucket is not None and (kept is None or kept.client_request_id == self.order.replacing):
            shared = await self._take_over(SharedAnswers(self.bucket), kept)
            if shared is not None and self.results is not None:
                await self.results.write(shared)
            kept = shared or kept
        return kept

    async def _take_over(self, answers: SharedAnswers, ours: Generation | None) -> Generation | None:
        """Record another host's answer in this host's spool. One that can't be read counts as lost."""
        shared = await answers.find(self.fingerprint)
        if shared is None or (ours is not None and shared.call.client_request_id == ours.client_request_id):
            return None
        try:
            generation = shared.read()
        except ServiceError as error:
            self.spool.open_call(shared.call)
            self.spool.leave_open(shared.call, error)
            with suppress(OSError):
                await run_to_end(self.spool.keep_answer, shared)
            return None
        return await run_to_end(_keep, shared.call, generation, self.spool)

    async def _pay(self) -> Generation:
        await _check_repeats(self.request, self.fingerprint, self.client, self.spool)
        if self.bucket is not None:
            await self.bucket.prove_writable()
        try:
            generation = await generate(
                self.request,
                self.client,
                self.spool,
                order=self.order,
                answers=None if self.bucket is None else SharedAnswers(self.bucket),
            )
        except ServiceError as error:
            if (
                error.billed is Billed.UNKNOWN
                and len(self.spool.open_calls(self.fingerprint)) > current_settings().repeat_unknown
            ):
                error.retryable = False  # the next attempt would be refused
            raise
        if self.results is not None:
            await self.results.write(generation)
        return generation


async def _check_repeats(request: ImageRequest, fingerprint: str, client: AimlApiClient, spool: Spool) -> None:
    """Refuse a request whose answers were lost too often, after reconciling their cost with the service's log."""
    allowed = current_settings().repeat_unknown
    lost = spool.open_calls(fingerprint)
    unread = None
    if len(lost) > allowed and any(call.billed is Billed.UNKNOWN for call in lost):
        unread = (await reconcile(client, spool, calls=lost)).reason
        lost = spool.open_calls(fingerprint)
    if len(lost) <= allowed:
        return
    costs = "; ".join(map(_describe_cost, lost))
    raise RepeatLimitReached(
        f"Not sent: {len(lost)} {'answer' if len(lost) == 1 else 'answers'} to {request.label!r} "
        f"{'was' if len(lost) == 1 else 'were'} lost before, and FLUX_PREFECT_REPEAT_UNKNOWN is {allowed}. By the "
        f"service's log: {costs}. {f'{unread} ' if unread else ''}Ask the service's support about these ids; to send "
        f"it again, which may be paid for again, set FLUX_PREFECT_REPEAT_UNKNOWN={len(lost)}.",
        client_request_id=lost[-1].client_request_id,
    )


def _settle_by(kept: Generation) -> None:
    """Settle the call of a kept answer, which this run may have sent in an attempt that was killed."""
    budget = current_budget()
    if budget is not None:
        budget.ledger.settle(kept.client_request_id, Billed.YES, kept.credits_used, delivered=True)


def _describe_cost(call: PaidCall) -> str:
    if call.billed is Billed.UNKNOWN:
        return f"{call.client_request_id} possibly billed"
    cost = "at an unknown cost" if call.credits_used is None else f"with {describe_credits(call.credits_used)}"
    return f"{call.client_request_id} billed {cost}"


def _name_kept_answer(error: ServiceError, path: Path | None) -> None:
    if path is not None:
        found = f"{error.message} The answer is kept as {path}; a release that can read it takes it up by itself."
        error.args = (found,)


def recover(request: ImageRequest, endpoint: str, spool: Spool) -> Generation | None:
    """Return the answer that this host has already paid for, from the spool alone, or None.

    Raises:
        SpoolUnreadable: the spool may hold the answer, so nothing must be paid.
    """
    if request.seed is None:
        return None
    fingerprint = request.fingerprint(endpoint)
    generation = spool.find_generation(fingerprint)
    if generation is None:
        generation = _take_up(spool.kept_answers(fingerprint), spool)
    return None if generation is None else _slim(generation)


def _take_up(answers: Iterable[KeptAnswer], spool: Spool) -> Generation | None:
    """Record and return the first readable kept answer, which a run paid for and ended before recording."""
    for kept in answers:
        with suppress(ServiceError):
            return _keep(kept.call, kept.read(), spool)
    return None


async def take_up(kept: KeptAnswer, spool: Spool) -> tuple[Generation, bool]:
    """Parse a kept answer and record its generation, unless another answer to the same request is recorded.

    Returns:
        The generation, and whether it is the recorded one.

    Raises:
        InvalidResponse, EmptyGeneration: this release can't parse it.
        SpoolUnreadable: the spool can't be read.
    """
    generation = kept.read()
    async with _LOCKS.hold(f"generate-{generation.fingerprint}"):
        recorded = await run_in_thread(spool.find_generation, generation.fingerprint)
        if recorded is not None and recorded.client_request_id != generation.client_request_id:
            return _slim(generation), False
        return await run_to_end(_keep, kept.call, generation, spool), True


async def download(  # noqa: PLR0913 - what is wanted, and every place that may have it
    generation: Generation,
    index: int,
    client: AimlApiClient,
    spool: Spool,
    bucket: ImageBucket | None = None,
    *,
    order: Order = _PLAIN,
) -> ImageFile:
    """Download one image into the spool and check it. A whole file that is there already is not fetched again.

    With a bucket, an image whose URL is dead comes from there if it is published, or from the bucket to which this
    host has published it. Without one, and unless `order.refresh`, the result then describes a published image whose
    file has left the spool: `publish` finds that image.

    Raises:
        ImageUnwritable: the spool can't take it; nothing was fetched.
        ContentFlagged: the service flagged the image or delivered it black. It is not processed further.
        BrokenImage, UnexpectedFormat, UnexpectedSize: so the service delivers it. It is kept in the spool as rejected,
            and is not fetched again while it is there.
        ImageGone: neither its URL nor the spool nor the bucket has it any more.
        DownloadError: the bytes could not be fetched, or are not the image asked for.
        BucketError: the bucket can't be read.
    """
    image = _image(generation, index)
    if image.flagged:
        raise ContentFlagged(
            f"The service flagged image {index} of {generation.request.label!r} as unsafe. It was paid for and is "
            "not published. Change the prompt or the seed, or raise safety_tolerance."
        )
    shape = ExpectedShape.of(generation.request, image)
    found = await _find_spooled(generation, index, spool, shape)
    if found is None:
        try:
            found = await client.download(
                _url(generation, image, spool),
                spool.image_path(generation, index),
                expected=generation.request.output_format,
                shape=shape,
                delivered_at=generation.created_at,
            )
        except ImageGone:
            found = await _find_published(generation, index, spool, bucket, order)
            if found is None:
                raise
        else:
            await run_in_thread(spool.forget_published, generation, index)
        if generation.replaces is not None:  # fetched: if its URL dies later, it may be replaced again
            await run_in_thread(spool.settle_replacement, generation)
    if found.black:
        await run_in_thread(spool.reject, generation, index)
        raise black_image(generation, index)
    return ImageFile(**found.model_dump(), index=index, generation=generation)


async def _find_spooled(
    generation: Generation, index: int, spool: Spool, shape: ExpectedShape | None
) -> DownloadedImage | None:
    if spool.rejected_path(generation, index).exists():
        return await run_in_thread(spool.reconsider, generation, index, shape)
    if spool.image_path(generation, index).exists():
        return await run_in_thread(spool.find_image, generation, index, shape)
    return None


async def _find_published(
    generation: Generation, index: int, spool: Spool, bucket: ImageBucket | None, order: Order
) -> DownloadedImage | None:
    note = await run_in_thread(spool.find_published, generation, index)
    if bucket is not None:
        published = await bucket.find(generation.request, generation.fingerprint, index)
        if published is not None:
            return await _read_back(published, generation, index, spool, bucket)
        if note is not None:  # in another bucket, or under another prefix
            with suppress(BucketError, ValidationError):
                return await _read_back(PublishedImage.model_validate(note.published), generation, index, spool, bucket)
    return None if order.refresh else note


async def _read_back(
    published: PublishedImage, generation: Generation, index: int, spool: Spool, bucket: ImageBucket
) -> DownloadedImage:
    content = await bucket.read_image(published)
    await run_in_thread(spool.keep_image, generation, index, content)
    found = await run_in_thread(spool.find_image, generation, index)
    if found is None:
        raise NotAnImage(f"{published.uri} is published and is not a whole image any more.", retryable=False)
    return found


async def publish(file: ImageFile, bucket: ImageBucket, run: PublishingRun) -> PublishedImage:
    """Publish an image unless it is there already. The answer that other hosts find is removed with the last image.

    Raises:
        ImageChanged: the file is gone or changed since it was checked, and the image is not published.
        BucketError, SpoolUnreadable: as `ImageBucket.publish`.
    """
    generation = file.generation
    image = None
    if not file.is_whole():  # as the spool keeps nothing that is published
        image = await bucket.find(generation.request, generation.fingerprint, file.index)
    if image is None:
        image = await bucket.publish(file, run)
    answers = SharedAnswers(bucket)
    if generation.shared_as == answers.uri_of(generation.fingerprint) and await _others_are_published(file, bucket):
        await answers.drop(generation.fingerprint)
    return image


async def release(file: ImageFile, image: PublishedImage, spool: Spool) -> None:
    """Let a published image leave the spool, after `keep_published_hours`. Others whose time has come leave now.

    Never raises.
    """
    await run_in_thread(_release, file, image, spool)


def _release(file: ImageFile, image: PublishedImage, spool: Spool) -> None:
    with suppress(OSError, SpoolUnreadable):
        spool.note_published(file, image.model_dump(mode="json"))
        if not current_settings().keep_published_hours:
            spool.image_path(file.generation, file.index).unlink(missing_ok=True)
            spool.drop_inline(file.generation.fingerprint, file.index)
        shrink_at_times(spool, _LOCKS)


async def _others_are_published(file: ImageFile, bucket: ImageBucket) -> bool:
    request = file.generation.request
    for index in range(request.num_images):
        try:
            if index != file.index and await bucket.find(request, file.generation.fingerprint, index) is None:
                return False
        except BucketError:  # this image is published all the same
            return False
    return True


def _keep(call: PaidCall, generation: Generation, spool: Spool) -> Generation:
    try:
        spool.keep_generation(generation)
    except OSError:
        # A full disk: only the caller and Prefect's results have it now.
        return generation
    spool.close_call(call)
    spool.drop_answer(call.fingerprint, call.client_request_id)
    return _slim(generation)


def _image(generation: Generation, index: int) -> GeneratedImage:
    for image in generation.images:
        if image.index == index:
            return image
    raise EmptyGeneration(
        f"The service was asked for {generation.request.num_images} images and answered with "
        f"{len(generation.images)}: there is no image {index}. The call was billed. Ask for the same with "
        "another seed, or one image a request.",
        client_request_id=generation.client_request_id,
        billed=Billed.YES,
        retryable=False,
    )


def _url(generation: Generation, image: GeneratedImage, spool: Spool) -> str:
    if image.url is not None:
        return image.url
    kept = spool.find_generation(generation.fingerprint)
    inline = None if kept is None else _image(kept, image.index).url
    if inline is None:
        raise ImageGone(
            f"Image {image.index} of {generation.request.label!r} came inside the answer or is published, and this "
            f"host's spool ({spool.root}) no longer has it. If it is published, give download_image the bucket."
        )
    return inline


def _slim(generation: Generation) -> Generation:
    """The record without inline bytes, which stay in the spool."""
    images = tuple(
        image.model_copy(update={"url": None}) if (image.url or "").startswith("data:") else image
        for image in generation.images
    )
    return generation.model_copy(update={"images": images})


def _count(call: PaidCall, billed: Billed, credits_used: float | None) -> None:
    calls = _meter.get()
    if calls is not None:
        calls.append(CallOutcome(call.client_request_id, billed, credits_used))
