"""The plan of a batch, made without spending."""

from __future__ import annotations

from unittest.mock import AsyncMock
from uuid import uuid4

import pytest

from flux_prefect.api.models import ImageRequest
from flux_prefect.batch.planning import PlannedBatch, check_balance, make_plan
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishingRun
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import download, generate
from flux_prefect.errors import BalanceTooLow, BucketAccessDenied
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.plan import Plan, describe_plan
from flux_prefect.money.budget import Budget
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tables.table import Table

PRICE = 200_000


async def plan(
    rows: list[ImageRequest | dict[str, object]], bucket: ImageBucket, credentials: AimlApiCredentials
) -> PlannedBatch:
    """Make a plan without caps."""
    return await make_plan(Table(rows), bucket, credentials.base_url, Budget(default_price=PRICE), run="run-1")


async def test_every_row_is_counted_once(
    bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """Published, paid, repeated, invalid and to generate add up to the table."""
    published, held, fresh = (ImageRequest(prompt=uuid4().hex, seed=1) for _ in range(3))
    spool = Spool()
    async with credentials.get_client() as client:
        file = await download(await generate(published, client, spool), 0, client, spool)
        await bucket.publish(file, PublishingRun())
        await generate(held, client, spool)
    before = sandbox.control.summary()
    planned = await plan([published, held, fresh, fresh, {"prompt": ""}], bucket, credentials)
    sums = planned.plan

    assert (sums.published, sums.paid, sums.repeats, sums.invalid, sums.requests) == (1, 1, 1, 1, 1)
    assert sums.rows == 5
    assert sums.most_credits == PRICE
    (image,) = planned.found.get(published.fingerprint(credentials.base_url)) or ()
    assert (image.sha256, image.created) == (file.sha256, False)
    assert len(planned.found) == 1
    assert sandbox.control.summary() == before


async def test_seeds_are_drawn_once_for_plan_and_work(bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """The same run and row draw the same seed, so a plan made again is the same plan."""
    rows: list[ImageRequest | dict[str, object]] = [{"id": "a", "prompt": "a fox"}, {"id": "b", "prompt": "a fox"}]
    first, second = [await plan(rows, bucket, credentials) for _ in range(2)]

    assert [row.request for row in first.rows()] == [row.request for row in second.rows()]
    assert [row.request for row in first.rows()] == [row.request for row in first.rows()]
    assert first.plan.repeats == 0


async def test_a_request_with_a_missing_image_is_not_published(
    bucket: ImageBucket, credentials: AimlApiCredentials
) -> None:
    """One of two images in the bucket is not enough."""
    request = ImageRequest(prompt=uuid4().hex, seed=1, num_images=2)
    await publish_first(request, bucket, credentials)
    sums = (await plan([request], bucket, credentials)).plan

    assert (sums.published, sums.paid, sums.requests) == (0, 1, 0)


async def test_images_missing_in_a_listed_bucket_are_not_looked_up(
    bucket: ImageBucket, credentials: AimlApiCredentials
) -> None:
    """One HEAD for the image in the list, none for the three others."""
    requests = [ImageRequest(prompt=uuid4().hex, seed=seed) for seed in range(1, 5)]
    await publish_first(requests[2], bucket, credentials)
    requests_sent: list[str] = []
    bucket.get_client().meta.events.register("before-send.s3", lambda event_name, **_: requests_sent.append(event_name))
    sums = (await plan(list(requests), bucket, credentials)).plan

    assert (sums.published, sums.requests) == (1, 3)
    assert requests_sent == ["before-send.s3.ListObjectsV2", "before-send.s3.HeadObject"]


@pytest.mark.parametrize("answer", [None, BucketAccessDenied("s3:ListBucket is not allowed")], ids=["full", "refused"])
async def test_without_a_list_every_image_is_looked_up(
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    monkeypatch: pytest.MonkeyPatch,
    answer: BucketAccessDenied | None,
) -> None:
    """A bucket with too many keys or without permission to list gives the same plan."""
    request = ImageRequest(prompt=uuid4().hex, seed=1)
    await publish_first(request, bucket, credentials)
    monkeypatch.setattr(ImageBucket, "list_keys", AsyncMock(side_effect=[answer]))
    sums = (await plan([request, ImageRequest(prompt=uuid4().hex, seed=2)], bucket, credentials)).plan

    assert (sums.published, sums.requests) == (1, 1)


async def publish_first(request: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """Publish the first image of a request."""
    async with credentials.get_client() as client:
        file = await download(await generate(request, client, Spool()), 0, client, Spool())
    await bucket.publish(file, PublishingRun())


def make_sums(**changes: object) -> Plan:
    """Make a plan of three images."""
    sums = {"rows": 3, "invalid": 0, "published": 0, "paid": 0, "repeats": 0, "requests": 3, "images": 3}
    return Plan.model_validate(
        {**sums, "most_credits": 600_000, "max_credits": None, "max_images": None, "balance": None, **changes}
    )


def test_a_balance_that_covers_the_cap_is_enough() -> None:
    """No more than the cap can be spent."""
    check_balance(make_sums(balance=400_000, max_credits=400_000))
    check_balance(make_sums())
    with pytest.raises(BalanceTooLow, match=r"600,000 credits \(\$0\.30\) and the account has 400,000"):
        check_balance(make_sums(balance=400_000))


def test_a_plan_is_summed_up_in_a_line_and_a_table() -> None:
    """Both have the cap if image is one."""
    capped = make_sums(max_credits=400_000, seconds=12.0)

    assert capped.summary() == (
        "3 rows: 3 to generate; at most 600,000 credits ($0.30), capped at 400,000 credits ($0.20)"
    )
    assert describe_plan(capped)["cap"] == "400,000 credits ($0.20)"
    assert describe_plan(capped)["time at the last pace"] == "12 s"
