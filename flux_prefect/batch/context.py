"""The resources of a batch: bucket, account, client, spool and budget."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from prefect.runtime import flow_run

from flux_prefect.api.client import AimlApiClient
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import Billed
from flux_prefect.host.spool import Experience, PaidCall, Spool
from flux_prefect.money.budget import Budget
from flux_prefect.money.ledger import CallRecord, Ledger
from flux_prefect.money.shared_ledger import SharedLedger
from flux_prefect.pipeline import check_ready
from flux_prefect.settings import current_settings

__all__ = [
    "Attempt",
    "BatchContext",
    "current_attempt",
    "open_context",
    "open_ledger",
    "paying_as",
    "summing_up",
    "uncapped_budget",
]


@dataclass(frozen=True)
class BatchContext:
    """The resources of a batch, all of them verified.

    Attributes:
        bucket: the bucket to publish to.
        account: the account that pays, with its limit of calls at once.
        client: the account's client, shared by everything inside `open_context`.
        spool: this host's spool.
        experience: prices, pace and in-flight limit that earlier batches of this host observed at the endpoint.
        budget: the caps of the batch and what it has spent.
    """

    bucket: ImageBucket
    account: AimlApiCredentials
    client: AimlApiClient
    spool: Spool
    experience: Experience
    budget: Budget


@asynccontextmanager
async def open_context(  # noqa: PLR0913 - keyword-only from the third on
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    *,
    max_credits: float | None,
    max_images: int | None,
    prices: Mapping[str, float] | None = None,
    ledger_of: Attempt | None = None,
) -> AsyncIterator[BatchContext]:
    """Verify that bucket, account, spool and locks can be used, and keep the client open for the block.

    Args:
        bucket: the bucket to publish to.
        credentials: the account that pays.
        max_credits: the cap in credits, or None.
        max_images: the cap in paid images, or None.
        prices: the most credits that an image costs, by model; overrides the prices that this host observed.
        ledger_of: the attempt that pays; it continues the run's ledger, of this host and of others. None: a ledger in
            memory.

    Raises:
        BucketError: the bucket or its keys are wrong.
        SpoolUnwritable, LocksUnusable: the spool or the lock folder can't be used.
        ValueError: the account's concurrency limit is missing.
    """
    await check_ready(bucket)
    await credentials.check()
    spool = Spool()
    experience = spool.find_experience(credentials.base_url)
    async with AsyncExitStack() as cleanup:
        ledger = None if ledger_of is None else await cleanup.enter_async_context(open_ledger(ledger_of, bucket, spool))
        budget = Budget(
            prices={**experience.prices, **(prices or {})},
            default_price=current_settings().credits_per_image,
            max_credits=max_credits,
            max_images=max_images,
            ledger=ledger,
        )
        client = await cleanup.enter_async_context(credentials.open_client())
        yield BatchContext(bucket, credentials, client, spool, experience, budget)


@dataclass(frozen=True)
class Attempt:
    """One attempt of a flow run.

    Attributes:
        run: the flow run's id, the same in all its attempts.
        number: from 1.
    """

    run: str
    number: int


_paying: ContextVar[Attempt | None] = ContextVar("paying", default=None)
_enclosing: ContextVar[Ledger | None] = ContextVar("enclosing", default=None)


@contextmanager
def paying_as(attempt: Attempt) -> Iterator[None]:
    """Let the batch inside the block pay as a part of an enclosing flow run.

    A flow run that is retried runs its batch as a new subrun, whose own id is no key for what was spent before.
    """
    token = _paying.set(attempt)
    try:
        yield
    finally:
        _paying.reset(token)


@asynccontextmanager
async def summing_up(attempt: Attempt, bucket: ImageBucket) -> AsyncIterator[Ledger]:
    """Open the ledger of a run of several batches. It has every call of the batches inside the block.

    Raises:
        SpoolUnreadable, SpoolUnwritable: the file can't be used.
        BucketError: the bucket may have what other hosts noted, and can't be read.
    """
    async with open_ledger(attempt, bucket, Spool()) as ledger:
        token = _enclosing.set(ledger)
        try:
            yield ledger
        finally:
            _enclosing.reset(token)


def current_attempt() -> Attempt:
    """Return the attempt of the current flow run, or of the enclosing one that it pays for (see `paying_as`)."""
    return _paying.get() or Attempt(str(flow_run.id), flow_run.run_count or 1)


@asynccontextmanager
async def open_ledger(attempt: Attempt, bucket: ImageBucket, spool: Spool) -> AsyncIterator[Ledger]:
    """Open the ledger of a run, with what this host and others noted in earlier attempts.

    Calls of other hosts without an answer are open calls of this host from now on: the service's log is asked about
    them, and `FLUX_PREFECT_REPEAT_UNKNOWN` counts them.

    Raises:
        SpoolUnreadable, SpoolUnwritable: the file can't be used.
        BucketError: the bucket may have what other hosts noted, and can't be read.
    """
    with closing(Ledger(attempt.run, attempt.number, spool.root / "ledgers", within=_enclosing.get())) as ledger:
        shared = SharedLedger(bucket, attempt.run)
        unanswered = ledger.continue_from(await shared.read(), shared)
        if unanswered:
            known = {call.client_request_id for call in spool.open_calls()}
            for call in unanswered:
                if call.call not in known:
                    spool.open_call(_open_call(call))
        async with shared.flushing():
            yield ledger


def _open_call(call: CallRecord) -> PaidCall:
    return PaidCall(
        client_request_id=call.call,
        fingerprint=call.fingerprint,
        endpoint=call.endpoint,
        sent_at=call.sent_at,
        task_run_id=None,
        sends=call.sends,
        billed=call.billed,
        credits_used=call.credits_used,
        error="Its answer was lost on another host." if call.billed is Billed.YES else None,
    )


def uncapped_budget(endpoint: str) -> Budget:
    """Make a budget without caps, at the prices that this host observed at an endpoint: for estimates."""
    return Budget(prices=Spool().find_experience(endpoint).prices, default_price=current_settings().credits_per_image)
