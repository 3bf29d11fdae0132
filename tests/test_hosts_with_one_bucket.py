"""Hosts that share a bucket and nothing else: each has a spool, a lock folder and Prefect results of its own.

What one of them has paid for the others use, by the three tasks alone and by `produce_image`.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from pydantic import SecretStr
from support.nursery import Nursery
from support.s3_proxy import Answer, Passing, open_proxy, pass_on
from support.three_tasks import publish_cover
from support.waiting import wait_for

from flux_prefect.api.models import Generation, ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import (
    BucketAccessDenied,
    ImageGone,
    InvalidResponse,
    KeyOccupied,
    RepeatLimitReached,
)
from flux_prefect.host.spool import Spool
from flux_prefect.inline import run_inline
from flux_prefect.pipeline import Production, Status, StepRunner, produce_image, run_as_task
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tasks import generate_image

pytestmark = pytest.mark.usefixtures("prefect_server")

OnHost = Callable[[str], AbstractContextManager[None]]
"""What happens inside the block happens on the host of that name."""


@pytest.fixture
def on_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnHost:
    """One process as one host after the other."""

    @contextmanager
    def move(name: str) -> Iterator[None]:
        with (
            monkeypatch.context() as environment,
            temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / name / "results"}),
        ):
            environment.setenv("FLUX_PREFECT_SPOOL", str(tmp_path / name / "spool"))
            environment.setenv("FLUX_PREFECT_LOCKS", str(tmp_path / name / "locks"))
            yield

    return move


@pytest.fixture(autouse=True)
def first_host(on_host: OnHost) -> Iterator[None]:
    """A test begins on the first host."""
    with on_host("first"):
        yield


@pytest.fixture
def leased(bucket: ImageBucket) -> ImageBucket:
    """A bucket in which one host at a time makes an image."""
    return bucket.model_copy(update={"lease_seconds": 5.0})


@pytest.fixture(params=["without leases", "with leases"])
def shared(request: pytest.FixtureRequest, bucket: ImageBucket, leased: ImageBucket) -> ImageBucket:
    """The bucket that the hosts share."""
    return bucket if request.param == "without leases" else leased


@flow
async def generate(request: ImageRequest, credentials: AimlApiCredentials, bucket: ImageBucket | None) -> Generation:
    """The paid step alone, after which a host dies."""
    return await generate_image.with_options(retries=0)(request, credentials, bucket=bucket)


async def produce(
    request: ImageRequest, credentials: AimlApiCredentials, bucket: ImageBucket, run: StepRunner = run_as_task
) -> Production:
    """The whole path."""

    @flow
    async def whole_path() -> Production:
        return await produce_image(request, bucket, credentials, run=run)

    return await whole_path()


def billed(sandbox: RunningSandbox) -> int:
    """Calls that the service charged for, by its own books."""
    return sandbox.control.summary().billed_calls


async def list_below(bucket: ImageBucket, folder: str) -> list[str]:
    """The names in a folder below the bucket's prefix."""
    start = f"{bucket.prefix}/{folder}/"
    keys = await bucket.list_keys(most=1000) or frozenset()
    return sorted(key.removeprefix(start) for key in keys if key.startswith(start))


class TestThreeTasks:
    """The flow of the README."""

    async def test_the_first_host_died_between_the_answer_and_the_upload(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        shared: ImageBucket,
        request_: ImageRequest,
        on_host: OnHost,
    ) -> None:
        """The second publishes what the first has paid for; then nothing of it is left beside the images."""
        paid = await generate(request_, credentials, shared)
        kept = await list_below(shared, "answers")
        with on_host("second"):
            published = await publish_cover(request_, credentials, shared)

        assert kept == [f"{paid.fingerprint}.json"]
        assert published.created
        assert billed(sandbox) == 1
        assert await list_below(shared, "answers") == await list_below(shared, "leases") == []

    async def test_the_first_host_has_published(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        shared: ImageBucket,
        request_: ImageRequest,
        on_host: OnHost,
    ) -> None:
        """The second reads the generation back, downloads from the bucket and finds the image in its place."""
        first = await publish_cover(request_, credentials, shared)
        paid = await generate(request_, credentials, shared)
        downloads = sandbox.control.summary().downloads
        with on_host("second"):
            found = await generate(request_, credentials, shared)
            second = await publish_cover(request_, credentials, shared)

        assert billed(sandbox) == 1
        assert sandbox.control.summary().downloads == downloads
        assert not second.created
        assert (second.uri, second.sha256) == (first.uri, first.sha256)
        (image,) = found.images
        assert (image.url, image.width, image.height) == (None, first.width, first.height)
        fields = {"request", "endpoint", "fingerprint", "seed", "credits_used", "client_request_id", "created_at"}
        assert found.model_dump(include=fields) == paid.model_dump(include=fields)

    async def test_inline_images_are_shared_as_well(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        shared: ImageBucket,
        request_: ImageRequest,
        on_host: OnHost,
    ) -> None:
        """The bytes lie in the answer, and so in the bucket until the image does."""
        sandbox.control.settings(response_shape="b64")
        await generate(request_, credentials, shared)
        with on_host("second"):
            published = await publish_cover(request_, credentials, shared)

        assert published.created
        assert billed(sandbox) == 1
        assert await list_below(shared, "answers") == []

    async def test_an_answer_stays_until_the_last_of_its_images_is_published(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        bucket: ImageBucket,
        request_: ImageRequest,
        on_host: OnHost,
    ) -> None:
        """Two images of one call, published by two hosts."""
        pair = request_.model_copy(update={"num_images": 2})
        await publish_cover(pair, credentials, bucket, 0)
        between = await list_below(bucket, "answers")
        with on_host("second"):
            await publish_cover(pair, credentials, bucket, 1)

        assert len(between) == 1
        assert billed(sandbox) == 1
        assert await list_below(bucket, "answers") == []

    async def test_requests_without_a_seed_are_paid_for_each_time(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, shared: ImageBucket, request_: ImageRequest
    ) -> None:
        """Nothing of them is kept in the bucket."""
        unseeded = request_.model_copy(update={"seed": None})
        for _ in range(2):
            await generate(unseeded, credentials, shared)

        assert billed(sandbox) == 2
        assert await list_below(shared, "answers") == []

    async def test_a_bucket_that_forbids_deletion_publishes_all_the_same(
        self,
        credentials: AimlApiCredentials,
        bucket: ImageBucket,
        request_: ImageRequest,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The answer stays behind, and the log says that it can go."""

        def forbid_deletion(request: Passing) -> Answer | None:
            return Answer(403, {}, b"") if request.method == "DELETE" else pass_on(request)

        with open_proxy(str(bucket.endpoint_url)) as proxy, caplog.at_level(logging.WARNING):
            proxy.meddle = forbid_deletion
            published = await publish_cover(
                request_, credentials, bucket.model_copy(update={"endpoint_url": proxy.url})
            )

        assert published.created
        assert len(await list_below(bucket, "answers")) == 1
        assert "stays behind and can be deleted at any time" in caplog.text


class TestDeadURLs:
    """An answer whose URL died before any host fetched the image."""

    async def test_it_is_replaced_once_over_all_hosts(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        leased: ImageBucket,
        request_: ImageRequest,
        on_host: OnHost,
    ) -> None:
        """Two of three hosts pay; the third finds an answer that was a replacement, and stops."""
        sandbox.control.inject("dead_url", times=None)
        await generate(request_, credentials, leased)
        outcomes = []
        for host in ("second", "third"):
            with on_host(host):
                production = await produce(request_, credentials, leased)
            outcomes += [(type(outcome.error), billed(sandbox)) for outcome in production.images]

        assert outcomes == [(ImageGone, 2), (ImageGone, 2)]

    async def test_the_first_host_uses_the_replacement_of_the_second(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        leased: ImageBucket,
        request_: ImageRequest,
        on_host: OnHost,
    ) -> None:
        """Its own spool has the dead answer; the bucket has the newer one."""
        sandbox.control.inject("dead_url", times=1)
        await generate(request_, credentials, leased)
        with on_host("second"):
            dead = await generate(request_, credentials, leased)
            newer = await self._replace(dead, request_, credentials, leased)
        production = await produce(request_, credentials, leased)

        assert newer.replaces == dead.client_request_id
        assert [outcome.status for outcome in production.images] == [Status.PUBLISHED]
        assert billed(sandbox) == 2

    @staticmethod
    async def _replace(
        dead: Generation, request: ImageRequest, credentials: AimlApiCredentials, bucket: ImageBucket
    ) -> Generation:
        @flow
        async def replace() -> Generation:
            again = generate_image.with_options(refresh_cache=True)
            return await again(request, credentials, dead.client_request_id, bucket)

        return await replace()


class TestWholePath:
    """`produce_image`, as batches use it in either density."""

    @pytest.mark.parametrize("run", [run_as_task, run_inline], ids=["steps", "chunks"])
    async def test_what_a_dead_host_has_paid_for_is_published(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        leased: ImageBucket,
        request_: ImageRequest,
        on_host: OnHost,
        run: StepRunner,
    ) -> None:
        """The first could not fetch it; without its spool and its results, the second pays nothing."""
        sandbox.control.inject("gone_403", times=None)
        first = await produce(request_, credentials, leased, run)
        sandbox.control.clear_faults()
        with on_host("second"):
            second = await produce(request_, credentials, leased, run)

        assert [outcome.status for outcome in first.images] == [Status.FAILED]
        assert [outcome.status for outcome in second.images] == [Status.PUBLISHED]
        assert billed(sandbox) == 1
        assert await list_below(leased, "answers") == []

    async def test_what_leases_add_to_the_requests_of_an_image(
        self, credentials: AimlApiCredentials, leased: ImageBucket, request_: ImageRequest
    ) -> None:
        """One look for an answer, one that is kept and one removed; without leases there is none of it."""
        counts = []
        with open_proxy(str(leased.endpoint_url)) as proxy:
            bucket = leased.model_copy(update={"endpoint_url": proxy.url})
            await produce(request_, credentials, bucket, run_inline)
            counts += [proxy.count(method, "/answers/") for method in ("GET", "PUT", "DELETE", "HEAD")]
            alone = bucket.model_copy(update={"lease_seconds": None, "prefix": f"{bucket.prefix}/alone"})
            await produce(request_, credentials, alone, run_inline)

        assert counts == [1, 1, 1, 0]
        assert sum("/answers/" in path for _, path in proxy.passed) == 3


class TestErrorsBeforeMoney:
    """A bucket that may have the answer and can't say."""

    async def test_a_bucket_that_cannot_be_read(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, shared: ImageBucket, request_: ImageRequest
    ) -> None:
        """Its keys are wrong."""
        wrong = {"aws_access_key_id": "wrong", "aws_secret_access_key": SecretStr("wrong")}
        with pytest.raises(BucketAccessDenied):
            await generate(request_, credentials, shared.model_copy(update=wrong))

        assert billed(sandbox) == 0

    async def test_a_bucket_that_cannot_be_written(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, shared: ImageBucket, request_: ImageRequest
    ) -> None:
        """What could not be published is not paid for."""

        def forbid_writes(request: Passing) -> Answer | None:
            return Answer(403, {}, b"") if request.method == "PUT" else pass_on(request)

        with open_proxy(str(shared.endpoint_url)) as proxy:
            proxy.meddle = forbid_writes
            with pytest.raises(BucketAccessDenied):
                await generate(request_, credentials, shared.model_copy(update={"endpoint_url": proxy.url}))

        assert billed(sandbox) == 0

    async def test_an_answer_that_is_none(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, shared: ImageBucket, request_: ImageRequest
    ) -> None:
        """Something else lies in its place."""
        fingerprint = request_.fingerprint(credentials.base_url)
        await shared.write_path(f"answers/{fingerprint}.json", b"{}")
        with pytest.raises(KeyOccupied, match="nothing was sent"):
            await generate(request_, credentials, shared)

        assert billed(sandbox) == 0

    async def test_an_answer_that_no_host_can_parse_counts_on_all_of_them(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        shared: ImageBucket,
        request_: ImageRequest,
        on_host: OnHost,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The second host keeps it in its own spool, and does not pay for the same again."""
        monkeypatch.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "0")
        sandbox.control.inject("html_200", times=None)
        with pytest.raises(InvalidResponse):
            await generate(request_, credentials, shared)
        with on_host("second"), pytest.raises(RepeatLimitReached):
            await generate(request_, credentials, shared)
        with on_host("second"):
            kept = Spool().kept_answers(request_.fingerprint(credentials.base_url))

        assert billed(sandbox) == 1
        assert len(kept) == 1


class TestProcesses:
    """Hosts at the same moment, and hosts that are killed."""

    def _start(self, nursery: Nursery, bucket: ImageBucket, request: ImageRequest, host: Path) -> int:
        host.mkdir()
        return nursery.fork(
            "tests.support.three_tasks",
            [request.prompt, bucket.prefix, str(bucket.lease_seconds), str(host / "results")],
            {"FLUX_PREFECT_SPOOL": str(host / "spool"), "FLUX_PREFECT_LOCKS": str(host / "locks")},
            host / "said.txt",
        )

    async def test_two_hosts_at_once_pay_once(
        self,
        sandbox: RunningSandbox,
        nursery: Nursery,
        credentials: AimlApiCredentials,
        leased: ImageBucket,
        request_: ImageRequest,
        tmp_path: Path,
    ) -> None:
        """The second waits for the first one's lease, then uses its answer."""
        sandbox.control.settings(latency=2.0)
        running = [self._start(nursery, leased, request_, tmp_path / name) for name in ("a", "b")]
        ended = [nursery.wait(each) for each in running]

        assert ended == [0, 0], [(tmp_path / name / "said.txt").read_text() for name in ("a", "b")]
        assert sandbox.control.summary().calls == billed(sandbox) == 1
        found = await leased.find(request_, request_.fingerprint(credentials.base_url), 0)
        assert isinstance(found, PublishedImage)
        assert await list_below(leased, "answers") == await list_below(leased, "leases") == []

    async def test_a_host_that_is_killed_during_the_download_is_relieved(
        self, sandbox: RunningSandbox, nursery: Nursery, leased: ImageBucket, request_: ImageRequest, tmp_path: Path
    ) -> None:
        """`kill -9` between the answer and the upload: the next host pays nothing, and its flow publishes the image."""
        sandbox.control.inject("stall_download", times=1, seconds=60)
        first = self._start(nursery, leased, request_, tmp_path / "a")
        wait_for(lambda: sandbox.control.summary().downloads == 1)
        os.kill(first, signal.SIGKILL)
        assert nursery.wait(first) == -signal.SIGKILL
        second = self._start(nursery, leased, request_, tmp_path / "b")

        assert nursery.wait(second) == 0, (tmp_path / "b" / "said.txt").read_text()
        assert sandbox.control.summary().calls == billed(sandbox) == 1
        assert await list_below(leased, "answers") == []
