"""Heartbeats in a real bucket: sent, missed, and overwritten by the process that marks a run as lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import anyio
import pytest

from flux_prefect.bucket.conditional_object import ConditionalObject
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import BucketUnavailable, ShardSuperseded
from flux_prefect.sharding.heartbeat import Heartbeat, heartbeat_object, mark_lost, parse_heartbeat, sending_heartbeats

INTERVAL = 0.1


@pytest.fixture
def target(bucket: ImageBucket) -> ConditionalObject:
    """The object for the heartbeats of a run."""
    return heartbeat_object(bucket, uuid4().hex)


async def wait_for(target: ConditionalObject, condition: Callable[[Heartbeat], bool]) -> Heartbeat:
    """Read heartbeats until one meets the condition."""
    with anyio.fail_after(10):
        while (heartbeat := parse_heartbeat(await target.read())) is None or not condition(heartbeat):  # noqa: ASYNC110 - an object has to be polled
            await asyncio.sleep(0.02)
    return heartbeat


def never_lost(reason: str) -> None:
    """Fail the test if its run is marked as lost."""
    raise AssertionError(reason)


async def test_a_run_sends_heartbeats_while_it_works_and_a_final_one(target: ConditionalObject) -> None:
    """Each one differs and has the current fields; the final one has the last sums, also if the work fails."""
    fields: dict[str, Any] = {"done": 0}
    read: list[Heartbeat] = []

    async def work() -> None:
        async with sending_heartbeats(target, lambda: fields, interval=INTERVAL, on_lost=never_lost):
            read.append(await wait_for(target, lambda heartbeat: not heartbeat.done))
            fields["done"] = 5
            read.append(await wait_for(target, lambda heartbeat: heartbeat.done == 5))
            fields["credits_spent"] = 7.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    first, second = read
    last = parse_heartbeat(await target.read())

    assert first.number < second.number
    assert not second.ended
    assert last is not None
    assert (last.ended, last.credits_spent, last.lost) == (True, 7.0, False)


async def test_a_run_that_is_marked_as_lost_is_stopped(target: ConditionalObject) -> None:
    """At its next heartbeat; the mark stays in the bucket."""
    stopped = asyncio.Event()
    async with sending_heartbeats(target, dict, interval=INTERVAL, on_lost=lambda reason: stopped.set()):  # noqa: ARG005 - one reason
        while not await mark_lost(target, await target.read()):
            pass  # it has just sent another one
        with anyio.fail_after(10):
            await stopped.wait()
    last = parse_heartbeat(await target.read())

    assert last is not None
    assert last.lost
    assert not last.ended


async def test_a_run_with_a_newer_heartbeat_is_not_lost(target: ConditionalObject) -> None:
    """Marking it by an older heartbeat is refused."""
    async with sending_heartbeats(target, dict, interval=60, on_lost=never_lost):
        old = await target.read()
    assert not await mark_lost(target, old)


async def test_a_run_that_was_replaced_does_not_start(target: ConditionalObject) -> None:
    """It was marked as lost before its first heartbeat; the same holds for a run that was started before."""
    assert await mark_lost(target, None)
    with pytest.raises(ShardSuperseded):
        async with sending_heartbeats(target, dict, interval=60, on_lost=never_lost):
            raise AssertionError("it started")


async def test_an_outage_of_the_bucket_is_no_loss(bucket: ImageBucket) -> None:
    """The run continues its heartbeats after the outage, also if the bucket took one without answering."""
    run = uuid4().hex
    target = _Forgetful(bucket, f"manifests/{run}/sign.json", patience=5)
    async with sending_heartbeats(target, dict, interval=INTERVAL, on_lost=never_lost):
        target.unanswered = 2
        heartbeat = await wait_for(target, lambda heartbeat: heartbeat.number > 4)
    assert heartbeat.number > 4


class _Forgetful(ConditionalObject):
    """An object whose next writes succeed without an answer."""

    unanswered = 0

    async def write(self, content: bytes, *, over: str | None) -> str | None:
        etag = await super().write(content, over=over)
        if self.unanswered:
            self.unanswered -= 1
            raise BucketUnavailable("no answer")
        return etag
