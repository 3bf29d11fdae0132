"""The plan of a batch, made without spending."""

from __future__ import annotations

from unittest.mock import AsyncMock
from uuid import uuid4

import httpx
import pytest
from pydantic import SecretStr

from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.batch.planning import PlannedBatch, add_model_facts, check_balance, make_plan
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishingRun
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import download, generate
from flux_prefect.errors import BalanceTooLow, BucketAccessDenied, ModelWithdrawn
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


async def test_the_plan_has_the_services_own_prices_and_warnings(
    bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """By model; the larger counts where this host has paid more. The budget of the run has the same prices."""
    sandbox.control.settings(
        price=170_000,
        prices={"flux/dev": 30_000},
        deprecations=[{"id": "flux/dev", "status": "superseded", "replaced_by": "blackforestlabs/flux-2"}],
    )
    requests = [
        ImageRequest(prompt=uuid4().hex, seed=1),
        ImageRequest(prompt=uuid4().hex, seed=1, model="flux/dev", num_images=2),
        ImageRequest(prompt=uuid4().hex, seed=1, model="flux/schnell"),
    ]
    budget = Budget(default_price=PRICE, prices={"flux/schnell": 9_000})
    planned = await make_plan(Table(list(requests)), bucket, credentials.base_url, budget, run="run-1")
    sandbox.control.settings(prices={"flux/dev": 30_000, "flux/schnell": 6_000})
    async with credentials.get_client() as client:
        sums = await add_model_facts(planned, client, budget)

    assert planned.plan.most_credits == 3 * PRICE + 9_000
    assert sums.most_credits == 170_000 + 2 * 30_000 + 9_000
    assert budget.price_of(requests[1]).credits == 2 * 30_000
    warning = "flux/dev is superseded, replaced by blackforestlabs/flux-2: change the model before it is withdrawn"
    assert sums.warnings == (warning,)
    assert describe_plan(sums)["warning"] == warning


async def test_a_withdrawn_model_is_an_error_before_money_unless_its_images_are_published(
    bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """The message names the replacement."""
    old, new = (ImageRequest(prompt=uuid4().hex, seed=1, model="flux/dev") for _ in range(2))
    await publish_first(old, bucket, credentials)
    sandbox.control.settings(deprecations=[{"id": "flux/dev", "status": "withdrawn", "replaced_by": "flux-pro"}])
    before = sandbox.control.summary()
    async with credentials.get_client() as client:
        published = await plan([old], bucket, credentials)
        assert (await add_model_facts(published, client, Budget(default_price=PRICE))).published == 1
        planned = await plan([old, new], bucket, credentials)
        with pytest.raises(ModelWithdrawn, match=r"flux/dev is withdrawn, replaced by flux-pro\. Set another model"):
            await add_model_facts(planned, client, Budget(default_price=PRICE))
    assert sandbox.control.summary().calls == before.calls


async def test_a_service_that_lists_no_models_leaves_the_setting(
    bucket: ImageBucket, credentials: AimlApiCredentials
) -> None:
    """The plan is what it was."""
    budget = Budget(default_price=PRICE)
    planned = await plan([ImageRequest(prompt=uuid4().hex, seed=1)], bucket, credentials)
    async with AimlApiClient(
        api_key=SecretStr("key"),
        base_url="https://api.example",
        pacer=Pacer(1),
        transport=httpx.MockTransport(lambda _: httpx.Response(404, json={"message": "Not found", "statusCode": 404})),
    ) as client:
        assert await add_model_facts(planned, client, budget) == planned.plan


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
