"""Signs of life in a real bucket: given, missed, and written over by whoever takes a run for lost."""

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
from flux_prefect.sharding.heartbeat import Sign, giving_signs, read_sign, sign_of, take_for_lost

EVERY = 0.1


@pytest.fixture
def place(bucket: ImageBucket) -> ConditionalObject:
    """Where the signs of a run are."""
    return sign_of(bucket, uuid4().hex)


async def wait_for(place: ConditionalObject, condition: Callable[[Sign], bool]) -> Sign:
    """Look until the sign is such."""
    with anyio.fail_after(10):
        while (sign := read_sign(await place.read())) is None or not condition(sign):  # noqa: ASYNC110 - it is read
            await asyncio.sleep(0.02)
    return sign


def nobody(reason: str) -> None:
    """For runs that nobody takes for lost."""
    raise AssertionError(reason)


async def test_a_run_shows_that_it_lives_and_at_last_that_it_has_ended(place: ConditionalObject) -> None:
    """Each sign is another one, with what was done by then; the last one counts, also of work that failed."""
    told: dict[str, Any] = {"done": 0}
    seen: list[Sign] = []

    async def work() -> None:
        async with giving_signs(place, lambda: told, every=EVERY, stop=nobody):
            seen.append(await wait_for(place, lambda sign: not sign.done))
            told["done"] = 5
            seen.append(await wait_for(place, lambda sign: sign.done == 5))
            told["credits_spent"] = 7.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    first, second = seen
    last = read_sign(await place.read())

    assert first.number < second.number
    assert not second.ended
    assert last is not None
    assert (last.ended, last.credits_spent, last.lost) == (True, 7.0, False)


async def test_who_is_taken_for_lost_is_told_so(place: ConditionalObject) -> None:
    """At the next sign; and what was written over it stays."""
    stopped = asyncio.Event()
    async with giving_signs(place, dict, every=EVERY, stop=lambda reason: stopped.set()):  # noqa: ARG005 - one reason
        while not await take_for_lost(place, await place.read()):
            pass  # it has just given another one
        with anyio.fail_after(10):
            await stopped.wait()
    last = read_sign(await place.read())

    assert last is not None
    assert last.lost
    assert not last.ended


async def test_who_has_given_another_sign_is_not_lost(place: ConditionalObject) -> None:
    """Whoever judges by an old one is refused."""
    async with giving_signs(place, dict, every=60, stop=nobody):
        old = await place.read()
    assert not await take_for_lost(place, old)


async def test_a_run_that_comes_too_late_does_not_begin(place: ConditionalObject) -> None:
    """It was taken for lost before its first sign; the same holds for a run that was begun before."""
    assert await take_for_lost(place, None)
    with pytest.raises(ShardSuperseded):
        async with giving_signs(place, dict, every=60, stop=nobody):
            raise AssertionError("it began")


async def test_a_bucket_that_is_away_for_a_while_is_no_loss(bucket: ImageBucket) -> None:
    """The run goes on giving signs once it answers again, also where it had taken one without an answer."""
    run = uuid4().hex
    place = _Forgetful(bucket, f"manifests/{run}/sign.json", patience=5)
    async with giving_signs(place, dict, every=EVERY, stop=nobody):
        place.forget = 2
        sign = await wait_for(place, lambda sign: sign.number > 4)
    assert sign.number > 4


class _Forgetful(ConditionalObject):
    """One that writes, and then has no answer."""

    forget = 0

    async def write(self, content: bytes, *, over: str | None) -> str | None:
        etag = await super().write(content, over=over)
        if self.forget:
            self.forget -= 1
            raise BucketUnavailable("no answer")
        return etag
