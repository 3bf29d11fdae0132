"""One fingerprint, one payment: in whatever task, flow, run or process a request is made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from pydantic import SecretStr

from flux_prefect.api.models import Generation, ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BatchFailed, InvalidResponse, RepeatLimitReached, ResultStoreUnreadable
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.host.spool import Spool
from flux_prefect.inline import run_inline
from flux_prefect.pipeline import Production, Status, produce_image
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tasks import generate_image

pytestmark = pytest.mark.usefixtures("prefect_server")

_PATIENCE = 60.0
"""Seconds after which a wait that should be none counts as a wait for ever."""


def billed(sandbox: RunningSandbox) -> int:
    """Calls that the service charged for, by its own books."""
    return sandbox.control.summary().billed_calls


@pytest.fixture
def other(request_: ImageRequest) -> ImageRequest:
    """A second request."""
    return request_.model_copy(update={"seed": (request_.seed or 0) + 1})


class TestNested:
    """Tasks that are called inside a user's own tasks."""

    async def test_the_same_request_twice_inside_a_task(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """The second finds what the first paid for, although the enclosing task is still running."""

        @task
        async def covers() -> list[Generation]:
            return [await generate_image(request_, credentials) for _ in range(2)]

        @flow
        async def nightly() -> list[Generation]:
            return await covers()

        first, second = await asyncio.wait_for(nightly(), _PATIENCE)

        assert first == second
        assert billed(sandbox) == 1

    async def test_an_image_heals_inside_a_task(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, bucket: ImageBucket, request_: ImageRequest
    ) -> None:
        """A cached answer whose URL died is paid for anew, once, also inside a task that has used it already."""

        @task
        async def publish() -> Production:
            await generate_image(request_, credentials)
            sandbox.control.inject("dead_url", times=1)
            return await produce_image(request_, bucket, credentials)

        @flow
        async def nightly() -> Production:
            return await publish()

        production = await asyncio.wait_for(nightly(), _PATIENCE)

        assert [outcome.status for outcome in production.images] == [Status.PUBLISHED]
        assert production.regenerated
        assert billed(sandbox) == 2

    async def test_two_tasks_that_make_the_same_pair_in_either_order(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest, other: ImageRequest
    ) -> None:
        """One makes A then B, the other B then A, at the same time: both end, and each image is paid for once."""

        @task
        async def make(*requests: ImageRequest) -> None:
            for request in requests:
                await generate_image(request, credentials)

        @flow
        async def both() -> None:
            await asyncio.gather(make(request_, other), make(other, request_))

        await asyncio.wait_for(both(), _PATIENCE)

        assert billed(sandbox) == 2

    async def test_at_once_in_both_densities(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """With and without a task run, eight at the same moment."""

        @flow
        async def storm() -> None:
            await asyncio.gather(
                *(generate_image(request_, credentials) for _ in range(4)),
                *(run_inline(generate_image, request_, credentials) for _ in range(4)),
            )

        await asyncio.wait_for(storm(), _PATIENCE)

        assert billed(sandbox) == 1


class TestLostAnswers:
    """One count of lost answers for one fingerprint, over retries, reruns and restarts."""

    @pytest.fixture(autouse=True)
    def every_answer_is_lost(self, sandbox: RunningSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        """The service makes the image and the connection breaks; its log says nothing of it."""
        monkeypatch.setenv("FLUX_PREFECT_RETRIES", "3")
        sandbox.control.inject("reset_after_work", times=None)

    @pytest.mark.parametrize(("allowed", "paid"), [(0, 1), (1, 2)])
    async def test_retried_and_run_again(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        request_: ImageRequest,
        monkeypatch: pytest.MonkeyPatch,
        allowed: int,
        paid: int,
    ) -> None:
        """Three attempts of a flow, and the flow once more: sent once, and as often again as is allowed, in all."""
        monkeypatch.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", str(allowed))

        @flow(retries=2)
        async def nightly() -> Generation:
            return await generate_image(request_, credentials)

        for _ in range(2):
            with pytest.raises(RepeatLimitReached, match=r"FLUX_PREFECT_REPEAT_UNKNOWN"):
                await nightly()

        assert billed(sandbox) == paid


class TestUnreadableAnswers:
    """Answers in a shape that this release does not know."""

    async def test_it_is_kept_before_it_is_parsed(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """The body lies in the spool, the error says where, and running again pays nothing more than is allowed."""
        sandbox.control.inject("invalid_json", times=1)

        @flow
        async def nightly() -> Generation:
            return await generate_image(request_, credentials)

        with pytest.raises(InvalidResponse, match=r"kept as .*/answers/") as caught:
            await nightly.with_options(retries=0)()
        (kept,) = Spool().kept_answers(request_.fingerprint(credentials.base_url))

        assert str(Spool().answer_path(kept.call)) in caught.value.message
        assert kept.answer.content


class TestResultStorage:
    """Prefect's result storage, where an answer may lie that no spool here has."""

    async def test_a_storage_that_cannot_be_read_is_an_error_before_money(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        request_: ImageRequest,
        bucket: ImageBucket,
    ) -> None:
        """Prefect takes it for an empty one; nothing is sent all the same, in either density."""
        storage = bucket.model_copy(update={"aws_access_key_id": "wrong", "aws_secret_access_key": SecretStr("wrong")})
        await storage.save(f"unreadable-{uuid4().hex[:8]}")

        @flow
        async def nightly(*, inline: bool) -> Generation:
            step = generate_image.with_options(result_storage=storage, retries=0)
            return await (run_inline(step, request_, credentials) if inline else step(request_, credentials))

        for inline in (False, True):
            with pytest.raises(ResultStoreUnreadable, match="BucketAccessDenied"):
                await nightly(inline=inline)

        assert billed(sandbox) == 0

    async def test_another_spool_on_this_host_finds_the_result(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        request_: ImageRequest,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What one process has paid for is in the storage before the next one gets its turn."""

        @flow
        async def one(spool: str) -> Generation:
            monkeypatch.setenv("FLUX_PREFECT_SPOOL", str(tmp_path / spool))
            return await run_inline(generate_image, request_, credentials)

        with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
            first, second = await one("a"), await one("b")

        assert first == second
        assert billed(sandbox) == 1


class TestRefusedDownloads:
    """An image's host, or a proxy on the way, that refuses everything."""

    async def test_nothing_is_paid_again_while_the_url_lives(
        self, sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """Three nights of 403: one call. Once the proxy lets it through, the image comes from the same URL."""

        @flow
        async def nightly() -> Production:
            return await produce_image(request_, bucket, credentials)

        sandbox.control.inject("gone_403", times=None)
        for _ in range(3):
            production = await nightly()
            assert [type(outcome.error).__name__ for outcome in production.images] == ["DownloadRefused"]
        sandbox.control.clear_faults()
        production = await nightly()

        assert [outcome.status for outcome in production.images] == [Status.PUBLISHED]
        assert billed(sandbox) == 1


async def test_a_batch_behind_a_proxy_that_refuses_all_stops_paying(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Twelve rows: a few are paid for and kept, the rest says why it was not sent; later all of it is published."""
    rows = [request_.model_copy(update={"seed": seed}) for seed in range(100, 112)]
    sandbox.control.inject("gone_403", times=None)

    with pytest.raises(BatchFailed) as caught:
        await publish_batch(rows, bucket, credentials, max_in_flight=1)
    paid = billed(sandbox)
    messages = [record.message or "" for record in caught.value.report.read("failed")]
    sandbox.control.clear_faults()
    report = await publish_batch(rows, bucket, credentials, max_in_flight=4)

    assert 4 <= paid < 8
    assert sum("an earlier row failed for a reason that all rows share" in message for message in messages) == 12 - paid
    assert report.count("published") == 12
    assert billed(sandbox) == 12


async def test_a_batch_whose_answers_cannot_be_read_stops_after_two(
    sandbox: RunningSandbox, bucket: ImageBucket, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Twelve rows: what was paid for is kept, and the rest is not sent."""
    rows = [request_.model_copy(update={"seed": seed}) for seed in range(200, 212)]
    sandbox.control.inject("html_200", times=None)

    with pytest.raises(BatchFailed):
        await publish_batch(rows, bucket, credentials, max_in_flight=1)

    endpoint = credentials.base_url
    kept = sum(len(Spool().kept_answers(row.fingerprint(endpoint))) for row in rows)
    assert kept == sandbox.control.summary().billed_calls
    assert kept <= 6  # two rows in a row and what was in flight, each sent again once at most
