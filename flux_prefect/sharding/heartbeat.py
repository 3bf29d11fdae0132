"""Signs of life: how a run on another machine shows that it is at work, and what it has spent.

Prefect leaves a run whose process was killed together with its worker Running for ever. Its own heartbeats come every
30 seconds at the least, tell nothing but life, and nothing keeps a run that was taken for dead from going on when it
was only asleep. So a run writes a small object in the bucket instead, `manifests/<run>/sign.json`, each time over the
version that it wrote before: whoever takes the run for lost writes over it too, and at its next sign the run finds
that out and stops to pay. Clocks are not compared.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux_prefect.bucket.conditional_object import ConditionalObject
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.object_operations import Version
from flux_prefect.errors import BucketError, ShardSuperseded
from flux_prefect.money.reconciliation import Reconciliation

__all__ = ["Sign", "giving_signs", "read_sign", "sign_of", "take_for_lost"]

_logger = logging.getLogger(__name__)

_PATIENCE = 10.0
_LAST_TRIES = 3


class Sign(BaseModel):
    """What a run tells of itself while it is at work, and at its end."""

    model_config = ConfigDict(frozen=True)

    writer: str = Field(default="", description="Different for each process, so that it knows its own signs.")
    number: int = Field(default=0, description="One more with each sign, so that no two are the same.")
    done: int = Field(default=0, description="Rows that have ended.")
    images: int = Field(default=0, description="Images published.")
    credits_spent: float = Field(default=0, description="What its calls cost, or may have cost, in credits.")
    images_spent: int = Field(default=0, description="Images that it paid for, or may have paid for.")
    in_flight: int | None = Field(default=None, description="Calls at once that the service took, if it refused more.")
    prices: dict[str, float] = Field(default_factory=dict, description="Most credits that an image cost, by model.")
    ended: bool = Field(default=False, description="It is the last one: nothing is spent after it.")
    reconciliation: Reconciliation | None = Field(
        default=None, description="What the service's log said of lost calls."
    )
    lost: bool = Field(default=False, description="Not written by the run itself: it was taken for lost.")


def sign_of(bucket: ImageBucket, run: str) -> ConditionalObject:
    """Where a run's sign is."""
    return ConditionalObject(bucket, f"manifests/{run}/sign.json", patience=_PATIENCE)


def read_sign(version: Version | None) -> Sign | None:
    """What is in a sign; None where there is none, or something else."""
    if version is None:
        return None
    try:
        return Sign.model_validate_json(version.content)
    except ValidationError:
        return None


@asynccontextmanager
async def giving_signs(
    place: ConditionalObject, read: Callable[[], dict[str, Any]], *, every: float, stop: Callable[[str], None]
) -> AsyncIterator[None]:
    """Give a sign of life at once, every `every` seconds while the block runs, and at its end, however it ends.

    One PUT each. The last one is of a run that spends nothing any more: leave the block when that is so. A bucket that
    does not answer is asked again with the next sign.

    Args:
        place: from `sign_of`.
        read: the fields of a sign, as they stand now.
        every: seconds between two.
        stop: called once where somebody has taken the run for lost, with the reason.

    Raises:
        ShardSuperseded: at the beginning, where there is a sign of this run already.
        BucketError: at the beginning, where it can't be given.
    """
    signs = _Signs(place, read, stop)
    if not await signs.give():
        raise ShardSuperseded(f"{place.uri} is there already: another process has begun this run, or it came too late.")
    ended = asyncio.Event()
    background = asyncio.create_task(signs.go_on(ended, every))
    try:
        yield
    finally:
        ended.set()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([background])
            await signs.end()


async def take_for_lost(place: ConditionalObject, seen: Version | None) -> bool:
    """Keep a run from paying any more: at its next sign, or where it has not begun, at its first.

    Args:
        place: of its signs.
        seen: its last sign.

    Returns:
        Whether it is so. Else it has given another sign since.

    Raises:
        BucketError: the bucket can't say.
    """
    sign = read_sign(seen) or Sign()
    content = sign.model_copy(update={"lost": True, "number": sign.number + 1}).model_dump_json().encode()
    return await place.write(content, over=None if seen is None else seen.etag) is not None


class _Signs:
    def __init__(
        self, place: ConditionalObject, read: Callable[[], dict[str, Any]], stop: Callable[[str], None]
    ) -> None:
        self._place, self._read, self._stop = place, read, stop
        self._writer = uuid4().hex
        self._number = 0
        self._etag: str | None = None
        self._lost = False

    async def give(self, **more: Any) -> bool:
        """Give one; False where somebody else has written there."""
        while True:
            self._number += 1
            sign = Sign(writer=self._writer, number=self._number, **self._read(), **more)
            etag = await self._place.write(sign.model_dump_json().encode(), over=self._etag)
            if etag is not None:
                self._etag = etag
                return True
            latest = await self._place.read()
            there = read_sign(latest)
            if latest is None or there is None or there.writer != self._writer or there.lost:
                return False
            self._etag = latest.etag  # of an earlier request that got through without an answer

    async def go_on(self, ended: asyncio.Event, every: float) -> None:
        while not self._lost:
            with anyio.move_on_after(every):
                await ended.wait()
                return
            await self._try(self.give)

    async def end(self) -> None:
        for _ in range(_LAST_TRIES):
            if self._lost or await self._try(lambda: self.give(ended=True)):
                return

    async def _try(self, give: Callable[[], Any]) -> bool:
        try:
            if await give():
                return True
            self._lost = True
            self._stop("the batch took this run for lost, and another one does its work")
            _logger.warning("Taken for lost, by %s", self._place.uri)
        except BucketError as error:
            _logger.warning("No sign of life could be given: %s", error)
        return False
