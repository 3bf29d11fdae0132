"""The ledger of a run in the bucket: what another host finds there."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

import pytest

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import Billed, BucketUnavailable
from flux_prefect.money import shared_ledger
from flux_prefect.money.ledger import CallRecord, Fold, Ledger
from flux_prefect.money.shared_ledger import SharedLedger

RUN = str(uuid4())


def make_record(call: str, **known: Any) -> CallRecord:
    """Make a record of a call for one image."""
    sent = datetime(2026, 7, 2, tzinfo=timezone.utc)
    return CallRecord(**{"call": call, "model": "flux", "images": 1, "price": 200_000, "sent_at": sent, **known})


async def test_another_host_finds_what_was_announced(bucket: ImageBucket) -> None:
    """Also if this host dies now, with nothing closed."""
    here = Ledger(RUN)
    here.continue_from([], SharedLedger(bucket, RUN))
    await asyncio.gather(*(here.announce(make_record(f"fp-{number}", row=number)) for number in range(5)))
    here.record(make_record("fp-0", row=0, billed=Billed.YES, credits_used=168_000.0, delivered=True))
    here.withdraw(make_record("fp-1", row=1, billed=Billed.NO, withdrawn=True))
    await here.announce(make_record("fp-5"))

    there = Ledger(RUN, 2)
    unanswered = there.continue_from(await SharedLedger(bucket, RUN).read(), SharedLedger(bucket, RUN))
    assert [call.call for call in unanswered] == ["fp-2", "fp-3", "fp-4", "fp-5"]
    assert (there.sums.calls, there.sums.billed_calls, there.sums.credits_used) == (5, 1, 168_000)
    assert there.sums.spent.images == 5
    assert there.is_continued


async def test_each_host_has_parts_of_its_own(bucket: ImageBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts that write at the same time overwrite nothing of each other, and a large part is followed by a next."""
    monkeypatch.setattr(shared_ledger, "_MAX_PART", 1_000)
    hosts = [SharedLedger(bucket, RUN), SharedLedger(bucket, RUN)]

    async def work(number: int, host: SharedLedger) -> None:
        for place in range(12):
            host.add(make_record(f"fp-{number}-{place}"))
            await host.flush()

    await asyncio.gather(*(work(number, host) for number, host in enumerate(hosts)))
    found = await SharedLedger(bucket, RUN).read()
    assert Fold(found).sums.calls == len(found) == 24
    keys = await bucket.list_keys(most=100)
    assert keys is not None
    assert len(keys) > 4
    assert all(f"/manifests/{RUN}/ledger/" in key for key in keys)


async def test_a_bucket_that_is_down_refuses_the_call_and_loses_no_record(
    bucket: ImageBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call must not be sent; the next flush has everything."""
    shared = SharedLedger(bucket, RUN)
    shared.add(make_record("fp-1"))
    with monkeypatch.context() as outage:

        def refuse(*_: Any, **__: Any) -> None:
            raise BucketUnavailable("down")

        outage.setattr(type(bucket.objects), "put_new", refuse)
        with pytest.raises(BucketUnavailable):
            await shared.flush()
    shared.add(make_record("fp-2"))
    await shared.flush()
    assert [record.call for record in await SharedLedger(bucket, RUN).read()] == ["fp-1", "fp-2"]


async def test_the_end_of_the_block_flushes(bucket: ImageBucket) -> None:
    """What ended last is in the bucket when the run has ended."""
    shared = SharedLedger(bucket, RUN)
    async with shared.flushing():
        shared.add(make_record("fp-1", billed=Billed.NO))
    (record,) = await SharedLedger(bucket, RUN).read()
    assert record.billed is Billed.NO


async def test_the_enclosing_run_has_it_too(bucket: ImageBucket) -> None:
    """A backfill on another host finds the calls of its days, whose own runs it can't know."""
    backfill, day = str(uuid4()), str(uuid4())
    enclosing = Ledger(backfill)
    enclosing.continue_from([], SharedLedger(bucket, backfill))
    part = Ledger(day, within=enclosing)
    part.continue_from([], SharedLedger(bucket, day))
    await part.announce(make_record("fp-1", row=7))
    (found,) = await SharedLedger(bucket, backfill).read()
    assert (found.call, found.row) == ("fp-1", None)
