"""Heartbeats: how a run on another machine shows that it is alive and what it has spent.

Prefect leaves a run whose process was killed together with its worker Running for ever. Prefect's own heartbeats come
at most every 30 seconds and carry no data, and nothing stops a run that was declared dead while its machine was only
suspended. So each run writes a small object to the bucket, `manifests/<run>/sign.json`, each time conditionally over
the version that it wrote before. The supervisor marks a run as lost by writing over the object too: the run's next
heartbeat then fails, and the run stops paying. Clocks are never compared.
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

__all__ = ["Heartbeat", "heartbeat_object", "mark_lost", "parse_heartbeat", "sending_heartbeats"]

_logger = logging.getLogger(__name__)

_PATIENCE = 10.0
_FINAL_TRIES = 3


class Heartbeat(BaseModel):
    """The progress and spending of a run, while it works and at its end."""

    model_config = ConfigDict(frozen=True)

    writer: str = Field(default="", description="Id of the process, by which it recognizes its own heartbeats.")
    number: int = Field(default=0, description="Increases with each heartbeat, so that no two are equal.")
    done: int = Field(default=0, description="Rows that have ended.")
    images: int = Field(default=0, description="Images published.")
    credits_spent: float = Field(default=0, description="What its calls cost, or may have cost, in credits.")
    images_spent: int = Field(default=0, description="Images that it paid for, or may have paid for.")
    in_flight: int | None = Field(
        default=None, description="Calls at once that the service accepts, if it refused more."
    )
    prices: dict[str, float] = Field(default_factory=dict, description="Most credits that an image cost, by model.")
    ended: bool = Field(default=False, description="Final heartbeat: nothing is spent after it.")
    reconciliation: Reconciliation | None = Field(
        default=None, description="Findings of the service's log about lost calls."
    )
    lost: bool = Field(default=False, description="Written by the supervisor, which marked the run as lost.")


def heartbeat_object(bucket: ImageBucket, run: str) -> ConditionalObject:
    """The object in the bucket that holds a run's latest heartbeat."""
    return ConditionalObject(bucket, f"manifests/{run}/sign.json", patience=_PATIENCE)


def parse_heartbeat(version: Version | None) -> Heartbeat | None:
    """Parse a heartbeat. Returns None if there is none, or if the content is something else."""
    if version is None:
        return None
    try:
        return Heartbeat.model_validate_json(version.content)
    except ValidationError:
        return None


@asynccontextmanager
async def sending_heartbeats(
    target: ConditionalObject,
    read_fields: Callable[[], dict[str, Any]],
    *,
    interval: float,
    on_lost: Callable[[str], None],
) -> AsyncIterator[None]:
    """Send a heartbeat at once, every `interval` seconds while the block runs, and at its end, however it ends.

    One PUT each. The final heartbeat says that the run spends nothing any more: leave the block only then. A heartbeat
    that the bucket did not take is sent again after the next interval, the final one up to 3 times.

    Args:
        target: from `heartbeat_object`.
        read_fields: returns the current fields of a heartbeat.
        interval: seconds between two heartbeats.
        on_lost: called once with the reason if the run was marked as lost.

    Raises:
        ShardSuperseded: before the block, if this run has a heartbeat already.
        BucketError: before the block, if the first heartbeat can't be written.
    """
    sender = _HeartbeatSender(target, read_fields, on_lost)
    if not await sender.send():
        raise ShardSuperseded(
            f"{target.uri} is there already: another process has started this run, or the batch has replaced it."
        )
    ended = asyncio.Event()
    background = asyncio.create_task(sender.send_until(ended, interval))
    try:
        yield
    finally:
        ended.set()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([background])
            await sender.send_final()


async def mark_lost(target: ConditionalObject, last_version: Version | None) -> bool:
    """Mark a run as lost: it stops paying at its next heartbeat, or if it has not started, does not start.

    Args:
        target: the run's heartbeat object.
        last_version: its last heartbeat that was read, or None if there was none.

    Returns:
        True if the run is marked; False if it has sent another heartbeat since.

    Raises:
        BucketError: the bucket can't be written.
    """
    heartbeat = parse_heartbeat(last_version) or Heartbeat()
    content = heartbeat.model_copy(update={"lost": True, "number": heartbeat.number + 1}).model_dump_json().encode()
    return await target.write(content, over=None if last_version is None else last_version.etag) is not None


class _HeartbeatSender:
    def __init__(
        self, target: ConditionalObject, read_fields: Callable[[], dict[str, Any]], on_lost: Callable[[str], None]
    ) -> None:
        self._target, self._read_fields, self._on_lost = target, read_fields, on_lost
        self._writer = uuid4().hex
        self._number = 0
        self._etag: str | None = None
        self._lost = False

    async def send(self, **more: Any) -> bool:
        """Send one heartbeat. Returns False if another process has written to the object."""
        while True:
            self._number += 1
            heartbeat = Heartbeat(writer=self._writer, number=self._number, **self._read_fields(), **more)
            etag = await self._target.write(heartbeat.model_dump_json().encode(), over=self._etag)
            if etag is not None:
                self._etag = etag
                return True
            latest = await self._target.read()
            stored = parse_heartbeat(latest)
            if latest is None or stored is None or stored.writer != self._writer or stored.lost:
                return False
            self._etag = latest.etag  # of an earlier request that succeeded although its answer was lost

    async def send_until(self, ended: asyncio.Event, interval: float) -> None:
        while not self._lost:
            with anyio.move_on_after(interval):
                await ended.wait()
                return
            await self._try(self.send)

    async def send_final(self) -> None:
        for _ in range(_FINAL_TRIES):
            if self._lost or await self._try(lambda: self.send(ended=True)):
                return

    async def _try(self, send: Callable[[], Any]) -> bool:
        try:
            if await send():
                return True
            self._lost = True
            self._on_lost("the batch marked this run as lost, and another run does its work")
            _logger.warning("Marked as lost by %s", self._target.uri)
        except BucketError as error:
            _logger.warning("The heartbeat could not be written: %s", error)
        return False
