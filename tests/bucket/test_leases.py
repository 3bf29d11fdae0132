"""Leases in a real bucket: one holder at a time, whatever becomes of holders, clocks and connections."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from prefect import flow
from pydantic import ValidationError
from support.s3_proxy import Answer, Passing, Proxy, open_proxy

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.conditional_object import ConditionalObject
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.leases import BucketLeases, Lease, LeaseRecord, current_lease, read_clock
from flux_prefect.bucket.object_operations import Version
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import generate, metered
from flux_prefect.errors import (
    Billed,
    BucketAccessDenied,
    BucketMissing,
    BucketUnavailable,
    ConditionsIgnored,
    KeyOccupied,
    LeaseLost,
)
from flux_prefect.host.spool import Spool
from flux_prefect.inline import run_inline
from flux_prefect.pipeline import Production, Status, produce_image
from flux_prefect.sandbox.launching import RunningSandbox

SECONDS = 2.5
"""How long a holder may be silent in these tests: long enough for a busy machine, too short for a form."""

NAME = f"leases/{hashlib.sha256(b'a').hexdigest()[:40]}.json"
"""Where the lease with the key `a` is, below the prefix."""


@pytest.fixture
def leases(bucket: ImageBucket) -> BucketLeases:
    """One host's leases in the bucket."""
    return BucketLeases(bucket, SECONDS)


@pytest.fixture
def proxy(bucket: ImageBucket) -> Iterator[Proxy]:
    """A way to the bucket's server on which things can happen."""
    assert bucket.endpoint_url is not None
    with open_proxy(bucket.endpoint_url) as opened:
        yield opened


@pytest.fixture
def distant(bucket: ImageBucket, proxy: Proxy) -> ImageBucket:
    """The same bucket, by that way."""
    return change(bucket, endpoint_url=proxy.url)


def change(bucket: ImageBucket, **fields: object) -> ImageBucket:
    """Another block with other fields, and a client of its own."""
    return ImageBucket.model_validate({name: getattr(bucket, name) for name in ImageBucket.model_fields} | fields)


def list_leases(bucket: ImageBucket) -> list[str]:
    """What lies where leases are."""
    listed = bucket.get_client().list_objects_v2(Bucket="images", Prefix=f"{bucket.prefix}/leases/")
    return [entry["Key"] for entry in listed.get("Contents", [])]


def read_record(bucket: ImageBucket) -> LeaseRecord:
    """What stands in the lease `a`."""
    stored = bucket.get_client().get_object(Bucket="images", Key=f"{bucket.prefix}/{NAME}")
    return LeaseRecord.model_validate_json(stored["Body"].read())


async def until(condition: Callable[[], bool]) -> None:
    """Look until something is so."""
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - of other processes
            await anyio.sleep(0.02)


def is_held(lease: Lease) -> bool:
    """What `check` says, as an answer."""
    try:
        lease.check()
    except LeaseLost:
        return False
    return True


# One at a time


async def test_many_hosts_hold_one_after_another(bucket: ImageBucket) -> None:
    """Of eight that want the same lease, one has it at a time, and each has it in the end."""
    inside, most, turns = 0, 0, 0

    async def want() -> None:
        nonlocal inside, most, turns
        async with BucketLeases(bucket, SECONDS).hold("a") as lease:
            inside, turns = inside + 1, turns + 1
            most = max(most, inside)
            await anyio.sleep(0.02)
            lease.check()
            inside -= 1

    await asyncio.gather(*(want() for _ in range(8)))

    assert (most, turns) == (1, 8)
    assert list_leases(bucket) == []


async def test_other_keys_and_other_prefixes_are_other_leases(bucket: ImageBucket, leases: BucketLeases) -> None:
    """None waits for the other."""
    elsewhere = change(bucket, prefix=f"{bucket.prefix}-2")
    with anyio.fail_after(SECONDS):
        async with leases.hold("a"), leases.hold("b"), BucketLeases(elsewhere, SECONDS).hold("a"):
            assert len(list_leases(bucket)) == 2


async def test_a_lease_says_who_holds_it_and_no_time(bucket: ImageBucket, leases: BucketLeases) -> None:
    """For people: host and process. A bare minimum, in which a clock can't be compared."""
    async with leases.hold("a"):
        record = read_record(bucket)
        assert list_leases(bucket) == [f"{bucket.prefix}/{NAME}"]

    assert record.fence == 1
    assert record.writes >= 1  # a slow machine has renewed it by now
    assert set(record.model_dump()) == {"holder", "host", "pid", "fence", "writes"}


async def test_a_long_work_keeps_its_lease(bucket: ImageBucket, leases: BucketLeases) -> None:
    """A waiting holder gets in after it, not when `lease_seconds` are over."""
    order: list[str] = []

    async def wait() -> None:
        async with BucketLeases(bucket, SECONDS).hold("a") as lease:
            order.append("second")
            assert lease.fence == 1

    async with leases.hold("a") as lease:
        waiting = asyncio.create_task(wait())
        await anyio.sleep(SECONDS * 1.4)
        lease.check()
        order.append("first")
    await waiting

    assert order == ["first", "second"]


async def test_the_lease_is_known_inside_its_block(leases: BucketLeases) -> None:
    """By code that it is not passed to, and nowhere else."""
    assert current_lease() is None
    async with leases.hold("a") as lease:
        assert current_lease() is lease
        assert await asyncio.create_task(_current()) is lease
    assert current_lease() is None


async def _current() -> object:
    return current_lease()


# Given back


async def test_a_failed_work_gives_its_lease_back(bucket: ImageBucket, leases: BucketLeases) -> None:
    """And its exception comes out as it was."""
    with pytest.raises(ValueError, match="as it was"):
        async with leases.hold("a"):
            raise ValueError("as it was")
    assert list_leases(bucket) == []


async def cancel(work: Coroutine[Any, Any, None], by: str, when: Callable[[], bool]) -> None:
    """Cancel work at some moment, by its task's own `cancel`, as Prefect does, or by the scope around it."""
    if by == "task":
        task = asyncio.create_task(work)
        await until(when)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: work)
            await until(when)
            group.cancel_scope.cancel()


@pytest.mark.parametrize("by", ["task", "scope"])
async def test_a_cancelled_work_gives_its_lease_back(bucket: ImageBucket, leases: BucketLeases, by: str) -> None:
    """However it is cancelled."""
    held = anyio.Event()

    async def work() -> None:
        async with leases.hold("a"):
            held.set()
            await anyio.sleep_forever()

    await cancel(work(), by, held.is_set)
    assert list_leases(bucket) == []


async def test_a_cancelled_wait_leaves_the_holder_alone(bucket: ImageBucket, leases: BucketLeases) -> None:
    """Nothing is left of who waited."""
    async with leases.hold("a") as lease:
        before = read_record(bucket)
        waiting = asyncio.create_task(BucketLeases(bucket, SECONDS).hold("a").__aenter__())
        await anyio.sleep(0.3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        lease.check()
        assert read_record(bucket).holder == before.holder


@pytest.mark.parametrize("by", ["task", "scope"])
async def test_cancelled_while_it_is_written_a_lease_is_given_back(
    bucket: ImageBucket, distant: ImageBucket, proxy: Proxy, by: str
) -> None:
    """The request is on its way: it is awaited, and what it wrote is removed."""

    def slowly(request: Passing) -> Answer:
        answer = request.forward()
        if request.method == "PUT":
            time.sleep(0.3)
        return answer

    async def work() -> None:
        async with BucketLeases(distant, 30).hold("a"):
            raise AssertionError("it was cancelled before")

    proxy.meddle = slowly
    await cancel(work(), by, lambda: proxy.count("PUT", NAME) > 0)

    assert proxy.count("PUT", NAME) == 1
    assert proxy.count("DELETE", NAME) == 1
    assert list_leases(bucket) == []


async def test_a_lease_that_cannot_be_removed_fails_nothing(
    distant: ImageBucket, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs out by itself; the log says what is not allowed."""
    proxy.meddle = lambda request: _denied() if request.method == "DELETE" else request.forward()
    async with BucketLeases(distant, SECONDS).hold("a"):
        pass
    assert "s3:DeleteObject" in caplog.text


async def test_a_hanging_server_does_not_hold_up_the_end(distant: ImageBucket, proxy: Proxy) -> None:
    """A work that is done is not kept from going on, whatever the server does."""

    def hang(request: Passing) -> Answer:
        time.sleep(SECONDS * 2)
        return request.forward()

    async with BucketLeases(distant, SECONDS).hold("a"):
        proxy.meddle = hang
        began = read_clock()
    assert read_clock() - began < SECONDS


# Taken over


async def test_a_silent_holder_is_relieved_and_knows(bucket: ImageBucket, distant: ImageBucket, proxy: Proxy) -> None:
    """Cut off from the bucket it tries until its time is over, then it has lost; only later the next one has it."""
    async with BucketLeases(distant, SECONDS).hold("a") as lease:
        proxy.meddle = lambda _: None
        cut_at = read_clock()
        waiting = asyncio.create_task(_take_and_tell(bucket))
        await until(lambda: not is_held(lease))
        lost_at = read_clock()
        assert not waiting.done()
        fence, taken_at = await waiting
        proxy.meddle = lambda request: request.forward()
        with pytest.raises(LeaseLost, match="not renewed") as caught:
            lease.check()

    assert caught.value.billed is Billed.NO
    assert fence == 2
    assert lost_at - cut_at < SECONDS
    assert taken_at - lost_at > 0


async def _take_and_tell(bucket: ImageBucket) -> tuple[int, float]:
    async with BucketLeases(bucket, SECONDS).hold("a") as lease:
        return lease.fence, read_clock()


async def test_who_lost_a_lease_does_not_remove_the_next_one(
    bucket: ImageBucket, distant: ImageBucket, proxy: Proxy
) -> None:
    """The end of the old holder's work is not the end of the new one's."""
    async with AsyncExitStack() as stack:
        async with BucketLeases(distant, SECONDS).hold("a"):
            proxy.meddle = lambda _: None
            lease = await stack.enter_async_context(BucketLeases(bucket, SECONDS).hold("a"))
            proxy.meddle = lambda request: request.forward()
        lease.check()
        assert read_record(bucket).fence == 2
    assert proxy.count("DELETE", NAME) == 0  # not even under the condition that it is still its own


async def test_a_lease_taken_away_is_noticed_at_the_next_renewal(bucket: ImageBucket, leases: BucketLeases) -> None:
    """However it was overwritten or removed: the holder stops, and names who has it."""
    client, key = bucket.get_client(), f"{bucket.prefix}/{NAME}"
    other = LeaseRecord(holder="x", host="elsewhere", pid=7, fence=2, writes=1).model_dump_json()
    for take_away, message in (
        (lambda: client.put_object(Bucket="images", Key=key, Body=other), "process 7 on elsewhere took it over"),
        (lambda: client.delete_object(Bucket="images", Key=key), "its object was removed"),
    ):
        async with leases.hold("a") as lease:
            take_away()
            await anyio.sleep(SECONDS * 0.6)
            with pytest.raises(LeaseLost, match=message):
                lease.check()
        client.delete_object(Bucket="images", Key=key)


class Clock:
    """A clock that can be put forward, as that of a machine that slept, or that shows another hour than all others."""

    def __init__(self, offset: float) -> None:
        self.offset = offset

    def read(self) -> float:
        """Seconds."""
        return read_clock() + self.offset


async def test_a_holder_that_slept_past_its_time_knows_at_once(bucket: ImageBucket) -> None:
    """By its own clock, before it asks anybody, though nobody took the lease over; and it never is holder again."""
    clock = Clock(0)
    async with BucketLeases(bucket, SECONDS, clock=clock.read).hold("a") as lease:
        lease.check()
        clock.offset = SECONDS
        with pytest.raises(LeaseLost, match="not renewed"):
            lease.check()
        await anyio.sleep(SECONDS * 0.6)
        with pytest.raises(LeaseLost):
            lease.check()


async def test_clocks_a_fortnight_apart_change_nothing(bucket: ImageBucket, distant: ImageBucket, proxy: Proxy) -> None:
    """Each goes by what it sees itself: no sooner and no later, though even the server's dates are wrong."""
    fortnight = 14 * 86_400.0

    def misdate(request: Passing) -> Answer:
        answer = request.forward()
        wrong = {"Last-Modified": "Thu, 01 Jan 2015 00:00:00 GMT", "Date": "Thu, 01 Jan 2015 00:00:00 GMT"}
        answer.headers = {**answer.headers, **{name: value for name, value in wrong.items() if name in answer.headers}}
        return answer

    proxy.meddle = misdate
    order: list[str] = []

    async def wait(offset: float) -> None:
        async with BucketLeases(distant, SECONDS, clock=Clock(offset).read).hold("a"):
            order.append("waiter")

    async with BucketLeases(bucket, SECONDS, clock=Clock(-fortnight).read).hold("a") as lease:
        waiting = [asyncio.create_task(wait(offset)) for offset in (fortnight, -2 * fortnight)]
        await anyio.sleep(SECONDS * 1.3)
        lease.check()
        order.append("holder")
    await asyncio.gather(*waiting)

    assert order == ["holder", "waiter", "waiter"]


async def test_a_waiter_counts_from_its_own_first_look(bucket: ImageBucket) -> None:
    """An object of unknown age, such as a dead holder's, is respected for the whole time."""
    dead = LeaseRecord(holder="dead", host="elsewhere", pid=7, fence=4, writes=9)
    bucket.get_client().put_object(Bucket="images", Key=f"{bucket.prefix}/{NAME}", Body=dead.model_dump_json())
    await anyio.sleep(0.5)
    began = read_clock()
    fence, taken_at = await _take_and_tell(bucket)

    assert fence == 5
    assert SECONDS <= taken_at - began < SECONDS * 2


async def test_of_many_waiters_one_takes_over(bucket: ImageBucket) -> None:
    """The dead holder's lease goes to one of them, the others wait for that one."""
    dead = LeaseRecord(holder="dead", host="elsewhere", pid=7, fence=1, writes=1)
    bucket.get_client().put_object(Bucket="images", Key=f"{bucket.prefix}/{NAME}", Body=dead.model_dump_json())
    fences = [fence for fence, _ in await asyncio.gather(*(_take_and_tell(bucket) for _ in range(8)))]

    assert sorted(fences) == [1] * 7 + [2]


# What servers and connections do


async def test_a_lost_answer_is_no_lost_lease(bucket: ImageBucket, distant: ImageBucket, proxy: Proxy) -> None:
    """A write that was carried out is recognised as one's own, be it the first one or a renewal."""
    dropped = 0

    def drop_every_other_answer(request: Passing) -> Answer | None:
        nonlocal dropped
        answer = request.forward()
        if request.method == "PUT" and answer.status == 200:
            dropped += 1
            return None if dropped % 2 else answer
        return answer

    proxy.meddle = drop_every_other_answer
    began = read_clock()
    async with BucketLeases(distant, SECONDS).hold("a") as lease:
        assert read_clock() - began < SECONDS  # it did not wait for itself
        await anyio.sleep(SECONDS * 1.3)
        lease.check()
        assert read_record(bucket).fence == 1
    assert dropped >= 3


async def test_a_conflict_with_another_request_is_no_lost_lease(distant: ImageBucket, proxy: Proxy) -> None:
    """409 ConditionalRequestConflict, as AWS answers where two requests meet: look, and try again."""
    puts = 0

    def conflict(request: Passing) -> Answer:
        nonlocal puts
        if request.method != "PUT":
            return request.forward()
        puts += 1
        return _error(409, "ConditionalRequestConflict") if puts % 2 else request.forward()

    proxy.meddle = conflict
    async with BucketLeases(distant, SECONDS).hold("a") as lease:
        await anyio.sleep(SECONDS * 1.2)
        lease.check()


async def test_a_renewal_that_hangs_is_given_up_for_another(distant: ImageBucket, proxy: Proxy) -> None:
    """While there is time; what becomes of the first is not waited for."""
    hanging: list[Passing] = []

    def hang_once(request: Passing) -> Answer:
        if request.method == "PUT" and not hanging:
            hanging.append(request)
            time.sleep(SECONDS * 1.5)
        return request.forward()

    async with BucketLeases(distant, SECONDS).hold("a") as lease:
        proxy.meddle = hang_once
        await anyio.sleep(SECONDS * 1.3)
        lease.check()
    assert len(hanging) == 1


async def test_an_outage_shorter_than_a_lease_is_borne(distant: ImageBucket, proxy: Proxy) -> None:
    """By who holds it and by who wants it."""

    async def mend() -> None:
        await anyio.sleep(SECONDS / 3)
        proxy.meddle = lambda request: request.forward()

    proxy.meddle = lambda _: _error(503, "SlowDown")
    mending = asyncio.create_task(mend())
    async with BucketLeases(distant, SECONDS).hold("a") as lease:
        await mending
        proxy.meddle = lambda _: _error(503, "SlowDown")
        await asyncio.create_task(mend())
        await anyio.sleep(SECONDS * 0.8)
        lease.check()


async def test_a_server_that_never_answers_is_reported(distant: ImageBucket, proxy: Proxy) -> None:
    """Not waited for longer than for a holder."""
    proxy.meddle = lambda _: None
    with anyio.fail_after(SECONDS * 3), pytest.raises(BucketUnavailable):
        await BucketLeases(distant, SECONDS).hold("a").__aenter__()


@pytest.mark.parametrize("condition", ["If-None-Match", "If-Match"])
async def test_a_server_that_overlooks_conditions_is_refused(
    distant: ImageBucket, proxy: Proxy, condition: str
) -> None:
    """On first use, before anything is done under the lease, with the server and the field to empty."""

    def overlook(request: Passing) -> Answer:
        answer = request.forward()
        return Answer(200, {"ETag": '"1"'}, b"") if answer.status == 412 and condition in request.headers else answer

    proxy.meddle = overlook
    with pytest.raises(ConditionsIgnored, match="leave lease_seconds") as caught:
        await BucketLeases(distant, SECONDS).hold("a").__aenter__()
    assert proxy.url in str(caught.value)
    assert caught.value.fatal


async def test_a_server_without_conditions_is_refused(distant: ImageBucket, proxy: Proxy) -> None:
    """501 NotImplemented, as some answer."""
    proxy.meddle = lambda _: _error(501, "NotImplemented")
    with pytest.raises(ConditionsIgnored, match="conditional writes"):
        await BucketLeases(distant, SECONDS).hold("a").__aenter__()


async def test_a_server_without_conditional_removals_will_do(
    bucket: ImageBucket, distant: ImageBucket, proxy: Proxy
) -> None:
    """The lease is removed without a condition, by who knows that it holds it."""

    def refuse(request: Passing) -> Answer:
        conditional = request.method == "DELETE" and "If-Match" in request.headers
        return _error(501, "NotImplemented") if conditional else request.forward()

    proxy.meddle = refuse
    async with BucketLeases(distant, SECONDS).hold("a"):
        pass
    assert list_leases(bucket) == []


async def test_a_missing_bucket_is_named(bucket: ImageBucket) -> None:
    """As everywhere."""
    with pytest.raises(BucketMissing, match="nowhere"):
        await BucketLeases(change(bucket, bucket_name="nowhere"), SECONDS).hold("a").__aenter__()


async def test_keys_that_may_not_write_are_named(bucket: ImageBucket) -> None:
    """At once: waiting would not help."""
    with pytest.raises(BucketAccessDenied):
        await BucketLeases(change(bucket, aws_access_key_id="WRONG"), SECONDS).hold("a").__aenter__()


async def test_a_stranger_in_a_leases_place_is_named(bucket: ImageBucket, leases: BucketLeases) -> None:
    """It is neither waited for nor overwritten."""
    bucket.get_client().put_object(Bucket="images", Key=f"{bucket.prefix}/{NAME}", Body=b"a note")
    with pytest.raises(KeyOccupied, match="remove it"):
        await leases.hold("a").__aenter__()


async def test_of_many_writers_at_once_one_wins(bucket: ImageBucket) -> None:
    """Over nothing, and over a version: what every lease stands on."""
    over: str | None = None
    for turn in range(2):
        writers = [ConditionalObject(bucket, "leases/race.json", patience=30) for _ in range(6)]
        contents = [f"{turn} {number}".encode() for number in range(6)]
        results = await asyncio.gather(
            *(writer.write(content, over=over) for writer, content in zip(writers, contents, strict=True))
        )
        (over,) = (result for result in results if result is not None)
        assert await writers[0].read() == Version(over, contents[results.index(over)])


# In the pipeline


@flow
async def produce(request: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials) -> Production:
    """The pipeline inside a flow run, as chunks use it."""
    return await produce_image(request, bucket, credentials, run=run_inline)


@pytest.fixture
def leased(bucket: ImageBucket) -> ImageBucket:
    """The bucket as several machines use it, with less patience than a form allows."""
    return bucket.model_copy(update={"lease_seconds": SECONDS})


async def test_a_fenced_holder_sends_nothing(
    sandbox: RunningSandbox, leased: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """The check stands right before the call goes out, and its refusal is no payment."""
    clock = Clock(0)
    async with credentials.open_client() as client, BucketLeases(leased, SECONDS, clock=clock.read).hold("a"):
        clock.offset = SECONDS
        with metered() as calls, pytest.raises(LeaseLost):
            await generate(request_, client, Spool())

    assert calls == []
    assert Spool().open_calls() == []
    assert sandbox.control.summary().calls == 0


@pytest.mark.usefixtures("prefect_server")
async def test_a_published_image_costs_no_lease(
    sandbox: RunningSandbox, bucket: ImageBucket, proxy: Proxy, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """One HEAD, as ever; and a new one costs a PUT, a second look and a DELETE more."""
    distant = change(bucket, endpoint_url=proxy.url, lease_seconds=30)
    first = await produce(request_, distant, credentials)
    new = list(proxy.passed)
    proxy.passed.clear()
    second = await produce(request_, distant, credentials)

    assert [first.images[0].status, second.images[0].status] == [Status.PUBLISHED, Status.UNCHANGED]
    assert [method for method, _ in proxy.passed] == ["HEAD"]
    assert [method for method, path in new if "/leases/" in path] == ["PUT", "PUT", "PUT", "DELETE"]  # two prove it
    assert sandbox.control.summary().billed_calls == 1
    assert list_leases(bucket) == []


@pytest.mark.usefixtures("prefect_server")
async def test_several_images_of_a_request_have_one_lease(
    sandbox: RunningSandbox, leased: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """They are one call."""
    sandbox.control.settings(latency=0.5)
    request = request_.model_copy(update={"num_images": 3})
    producing = asyncio.create_task(produce(request, leased, credentials))
    await until(lambda: sandbox.control.summary().in_flight == 1)
    held = list_leases(leased)
    production = await producing

    assert len(held) == 1
    assert [image.status for image in production.images] == [Status.PUBLISHED] * 3
    assert list_leases(leased) == []


@pytest.mark.usefixtures("prefect_server")
async def test_a_call_longer_than_a_lease_is_not_taken_over(
    sandbox: RunningSandbox, leased: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Another host that wants the same finds it published when its turn comes."""
    sandbox.control.settings(latency=SECONDS * 1.4)
    fingerprint = request_.fingerprint(credentials.base_url)
    producing = asyncio.create_task(produce(request_, leased, credentials))
    await until(lambda: sandbox.control.summary().in_flight == 1)
    async with BucketLeases(leased, SECONDS).hold(fingerprint) as lease:
        found = await leased.find(request_, fingerprint, 0)

    assert lease.fence == 1
    assert found is not None
    assert (await producing).images[0].status is Status.PUBLISHED


@pytest.mark.usefixtures("prefect_server")
async def test_what_is_published_while_it_waits_is_not_paid_for(
    sandbox: RunningSandbox, bucket: ImageBucket, proxy: Proxy, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Under the lease it looks again."""
    fingerprint = request_.fingerprint(credentials.base_url)
    distant = change(bucket, endpoint_url=proxy.url).model_copy(update={"lease_seconds": SECONDS})
    async with BucketLeases(bucket, SECONDS).hold(fingerprint):
        waiting = asyncio.create_task(produce(request_, distant, credentials))
        await until(lambda: proxy.count("GET", "/leases/") >= 1)
        publish_as_another_host(bucket, request_, fingerprint)
    production = await waiting

    assert production.images[0].status is Status.UNCHANGED
    assert sandbox.control.summary().calls == 0


def publish_as_another_host(bucket: ImageBucket, request: ImageRequest, fingerprint: str) -> None:
    """Put something under an image's key that looks like one."""
    metadata = {
        "flux-fingerprint": fingerprint,
        "flux-index": "0",
        "flux-sha256": hashlib.sha256(b"x").hexdigest(),
        "flux-width": "1",
        "flux-height": "1",
    }
    key = bucket.key_of(request, fingerprint, 0)
    bucket.get_client().put_object(Bucket="images", Key=key, Body=b"x", ContentType="image/jpeg", Metadata=metadata)


@pytest.mark.usefixtures("prefect_server")
async def test_without_a_lease_nothing_is_paid(
    sandbox: RunningSandbox, bucket: ImageBucket, proxy: Proxy, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """A server that can't keep one fails the image, and would fail all others."""
    proxy.meddle = lambda request: _error(501, "NotImplemented") if request.method == "PUT" else request.forward()
    distant = change(bucket, endpoint_url=proxy.url, lease_seconds=30)
    production = await produce(request_, distant, credentials)

    assert isinstance(production.error, ConditionsIgnored)
    assert production.error.fatal
    assert sandbox.control.summary().calls == 0


@pytest.mark.parametrize("seconds", [0, 4.9, 601, "often"])
def test_a_lease_has_bounds(seconds: object) -> None:
    """Shorter ones are lost on a busy machine, longer ones leave a dead holder's images waiting."""
    with pytest.raises(ValidationError, match="lease_seconds"):
        ImageBucket.model_validate({"bucket_name": "images", "lease_seconds": seconds})


def _error(status: int, code: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
    return Answer(status, {"Content-Type": "application/xml"}, body)


def _denied() -> Answer:
    return _error(403, "AccessDenied")
