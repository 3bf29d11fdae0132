"""The three steps of one image as plain functions: generate, download, upload.

They need no Prefect; `tasks` wraps them for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from uuid import uuid4

import anyio

from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest
from flux_prefect.bucket.leases import current_lease
from flux_prefect.concurrency import run_in_thread
from flux_prefect.errors import Billed, ContentFlagged, EmptyGeneration, ImageGone, ServiceError, UnexpectedFormat
from flux_prefect.host.spool import ImageFile, PaidCall, Spool
from flux_prefect.money.budget import current_budget

__all__ = ["CallOutcome", "download", "generate", "metered", "recover"]


@dataclass(frozen=True)
class CallOutcome:
    """How one paid call ended: for the accounts of whoever is metering."""

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
) -> Generation:
    """Pay for one call and keep its answer.

    The call is noted in the spool before it goes out and its answer is kept there before this returns, also
    when it is cancelled meanwhile: what was paid for, or may have been, is never unknown to the host.

    Raises:
        ServiceError: its `billed` says what it means for money.
        BudgetExhausted: nothing was sent, as it would pass the cap of the enclosing `spending_from`.
        RunStopped: nothing was sent, as that budget was closed.
        LeaseLost: nothing was sent, as the lease of the enclosing `BucketLeases.hold` is lost.
        SpoolUnwritable: nothing was sent.
    """
    call = PaidCall(
        client_request_id=f"fp-{uuid4().hex}",
        fingerprint="unseeded" if request.seed is None else request.fingerprint(client.base_url),
        endpoint=client.base_url,
        sent_at=datetime.now(timezone.utc),
        task_run_id=task_run_id,
        sends=0,
    )

    sent, billed, credits_used = False, Billed.NO, None

    def note() -> None:
        nonlocal call, sent, billed
        if budget is not None:
            budget.check_open()  # it may have been closed while the call waited for its turn
        if lease is not None:
            lease.check()
        # Now, after any wait for its turn.
        call = call.model_copy(update={"sent_at": datetime.now(timezone.utc), "sends": call.sends + 1})
        spool.open_call(call)
        sent, billed = True, Billed.UNKNOWN  # until there is an answer

    def take_note_back() -> None:
        nonlocal billed
        spool.close_call(call)
        billed = Billed.NO

    budget, lease = current_budget(), current_lease()
    reservation = None if budget is None else await budget.reserve(request)
    try:
        generation = await client.generate(
            request,
            client_request_id=call.client_request_id,
            before_send=note,
            after_refusal=take_note_back,
        )
        billed, credits_used = Billed.YES, generation.credits_used
    except ServiceError as error:
        billed, credits_used = error.billed, error.credits_used
        if error.billed is Billed.NO:
            spool.close_call(call)
        else:
            spool.leave_open(call, error)
        raise
    finally:
        if sent:
            _count(call, billed, credits_used)
        if reservation is not None:
            reservation.settle(billed, credits_used)
    with anyio.CancelScope(shield=True):
        # The thread has its work before anything is awaited: a task's own `cancel` passes the shield.
        keeping = asyncio.get_running_loop().run_in_executor(None, _keep, call, generation, spool)
        try:
            await asyncio.shield(keeping)
        except asyncio.CancelledError:
            await asyncio.wait([keeping])
            raise
    return keeping.result()


def recover(request: ImageRequest, endpoint: str, spool: Spool) -> Generation | None:
    """The answer that this host has paid for already, where its record outlived Prefect's own.

    Raises:
        SpoolUnreadable: nobody can tell, so nothing must be paid.
    """
    if request.seed is None:
        return None
    generation = spool.find_generation(request.fingerprint(endpoint))
    return None if generation is None else _slim(generation)


async def download(generation: Generation, index: int, client: AimlApiClient, spool: Spool) -> ImageFile:
    """Bring one image into the spool, checked. A whole file that is there already is not fetched again.

    Raises:
        ImageUnwritable: the spool can't take it; nothing was fetched.
        ContentFlagged: the service flagged the image or delivered it black. Nothing else is done with it.
        UnexpectedFormat: it came in another format before, and lies in the spool as that.
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
        )
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
        # A full disk: the caller, and Prefect's results behind it, are now the only ones who have it.
        return generation
    spool.close_call(call)
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
