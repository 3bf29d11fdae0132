"""Custody of paid answers: lock, look, note, pay, keep, parse, in this order, for every request.

Needs no Prefect; `tasks` wraps it. Every place that may hold the answer is looked at before anything is paid for,
and every answer is kept before it is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from flux_prefect.api.answers import RawAnswer
from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest
from flux_prefect.bucket.leases import current_lease
from flux_prefect.concurrency import run_in_thread, run_to_end
from flux_prefect.errors import (
    Billed,
    ContentFlagged,
    EmptyGeneration,
    ImageGone,
    RepeatLimitReached,
    ServiceError,
    UnexpectedFormat,
)
from flux_prefect.host.locks import HostLockManager
from flux_prefect.host.spool import ImageFile, KeptAnswer, PaidCall, Spool
from flux_prefect.money.budget import Budget, current_budget, describe_credits
from flux_prefect.money.reconciliation import reconcile
from flux_prefect.settings import current_settings

_LOCKS = HostLockManager()

__all__ = ["CallOutcome", "Order", "Results", "download", "generate", "metered", "obtain", "recover"]


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


async def generate(
    request: ImageRequest,
    client: AimlApiClient,
    spool: Spool,
    *,
    task_run_id: str | None = None,
    replaces: str | None = None,
) -> Generation:
    """Pay for one call and keep its answer.

    The call is noted in the spool before it goes out. The body of a success is kept there before it is parsed and
    before any slot of a limit is released, also if the caller is cancelled meanwhile: the host always has a record of
    what was paid for, or may have been.

    Args:
        request: What to make.
        client: Sends the call.
        spool: Keeps the answer.
        task_run_id: The Prefect task run that pays, for the note.
        replaces: The call whose dead answer this one replaces, if any.

    Raises:
        ServiceError: its `billed` says what it means for money.
        BudgetExhausted: nothing was sent, as it would pass the cap of the enclosing `spending_from`.
        RunStopped: nothing was sent, as that budget was closed.
        LeaseLost: nothing was sent, as the lease of the enclosing `BucketLeases.hold` is lost.
        SpoolUnwritable: nothing was sent.
    """
    budget = current_budget() or Budget(default_price=current_settings().credits_per_image)
    lease = current_lease()
    reservation = await budget.reserve(request)
    call = PaidCall(
        client_request_id=reservation.call,
        fingerprint="unseeded" if request.seed is None else request.fingerprint(client.base_url),
        endpoint=client.base_url,
        sent_at=datetime.now(timezone.utc),
        task_run_id=task_run_id,
        sends=0,
    )
    kept_as: Path | None = None

    async def keep(answer: RawAnswer) -> None:
        nonlocal kept_as
        with suppress(OSError):  # a full disk: only the parsed answer and Prefect's results have it
            kept_as = await run_to_end(spool.keep_answer, KeptAnswer(call=call, request=request, answer=answer))

    sent, billed, credits_used = False, Billed.NO, None

    def note() -> None:
        nonlocal call, sent, billed
        budget.check_open()  # it may have been closed while the call waited for its turn
        if lease is not None:
            lease.check()
        # Now, after any wait for its turn.
        call = call.model_copy(update={"sent_at": datetime.now(timezone.utc), "sends": call.sends + 1})
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
    return await run_to_end(_keep, call, generation.model_copy(update={"replaces": replaces}), spool)


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


async def obtain(
    request: ImageRequest, client: AimlApiClient, spool: Spool, order: Order, results: Results | None = None
) -> tuple[Generation, bool]:
    """Return the generation of a request, and whether this call paid for it.

    Runs one at a time on a host for one fingerprint, from the look until the answer is stored. Looks at
    Prefect's result, the spool's records and the answers that were never parsed. A request without a seed is paid for
    each time.

    Raises:
        RepeatLimitReached: answers to this request were lost before; nothing was sent.
        ResultStoreUnreadable, SpoolUnreadable: the answer may be there and can't be read; nothing was sent.
        ImageGone: the answer to be replaced was itself a replacement that was never fetched; nothing was sent.
        ServiceError, BudgetExhausted, RunStopped, LeaseLost, SpoolUnwritable: as `generate`.
    """
    if request.seed is None:
        return await generate(request, client, spool, task_run_id=order.task_run_id), True
    fingerprint = request.fingerprint(client.base_url)
    async with _LOCKS.hold(f"generate-{fingerprint}"):
        kept = await _look(request, client.base_url, spool, order, results)
        if kept is not None and kept.client_request_id != order.replacing:
            _settle_by(kept)
            return kept, False
        if kept is not None and kept.replaces is not None:
            raise ImageGone(
                f"The URL of {request.label!r} died before it was fetched, and so did that of the answer that "
                "replaced it: nothing more is paid for it. Find out why its host can't be reached in time, then "
                "generate with refresh_cache=True."
            )
        await _check_repeats(request, fingerprint, client, spool)
        try:
            generation = await generate(request, client, spool, task_run_id=order.task_run_id, replaces=order.replacing)
        except ServiceError as error:
            if (
                error.billed is Billed.UNKNOWN
                and len(spool.open_calls(fingerprint)) > current_settings().repeat_unknown
            ):
                error.retryable = False  # the next attempt would be refused
            raise
        if results is not None:
            await results.write(generation)
    return generation, True


async def _look(
    request: ImageRequest, endpoint: str, spool: Spool, order: Order, results: Results | None
) -> Generation | None:
    if order.refresh and order.replacing is None:
        return None
    kept = recover(request, endpoint, spool)
    if results is None:
        return kept
    if kept is None:
        return await results.read()
    await results.write(kept)
    return kept


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


async def download(generation: Generation, index: int, client: AimlApiClient, spool: Spool) -> ImageFile:
    """Download one image into the spool and check it. A whole file that is there already is not fetched again.

    Raises:
        ImageUnwritable: the spool can't take it; nothing was fetched.
        ContentFlagged: the service flagged the image or delivered it black. It is not processed further.
        UnexpectedFormat: it came in another format before, and is kept in the spool as rejected.
        ImageGone: neither its URL nor the spool has it any more.
        DownloadError: the bytes could not be fetched, or are not the image asked for.
    """
    image = _image(generation, index)
    if image.flagged:
        raise ContentFlagged(
            f"The service flagged image {index} of {generation.request.label!r} as unsafe. It was paid for and is "
            "not published. Change the prompt or the seed, or raise safety_tolerance."
        )
    rejected = spool.rejected_path(generation, index)
    if rejected.exists():
        raise UnexpectedFormat(
            f"Image {index} of {generation.request.label!r} came in another format than output_format asks for. It "
            f"was paid for and is kept as {rejected}; it is not published. Remove that file to fetch it again."
        )
    found = None
    if spool.image_path(generation, index).exists():
        found = await run_in_thread(spool.find_image, generation, index)
    if found is None:
        found = await client.download(
            _url(generation, image, spool),
            spool.image_path(generation, index),
            expected=generation.request.output_format,
            delivered_at=generation.created_at,
        )
        if generation.replaces is not None:  # fetched: if its URL dies later, it may be replaced again
            await run_in_thread(spool.settle_replacement, generation)
    if found.black:
        raise ContentFlagged(
            f"Image {index} of {generation.request.label!r} is black all over, which is how the service hides an "
            "unsafe one. It was paid for and is not published. Change the prompt or the seed."
        )
    return ImageFile(**found.model_dump(), index=index, generation=generation)


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
            f"Image {image.index} of {generation.request.label!r} came inside the answer, and this host's spool "
            f"({spool.root}) no longer has it."
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
