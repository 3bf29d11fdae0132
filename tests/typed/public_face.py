"""What a type checker sees of the public names. `make lint` checks it; nothing here runs."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from datetime import date
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.futures import PrefectFuture, PrefectFutureList
from typing_extensions import assert_type

import flux_prefect
from flux_prefect import (
    AimlApiClient,
    AimlApiCredentials,
    AuditFailed,
    AuditReport,
    BackfillReport,
    Balance,
    BatchFailed,
    BatchReport,
    Billed,
    Budget,
    DownloadedImage,
    FluxError,
    Generation,
    HostLockManager,
    ImageBucket,
    ImageFile,
    ImageRequest,
    ItemRecord,
    Production,
    PromptSeedCachePolicy,
    PublishedImage,
    Row,
    SweepReport,
    audit_bucket,
    backfill,
    download_image,
    draw_seed,
    find_published,
    generate_image,
    open_table,
    produce_image,
    publish_batch,
    publish_image,
    read_table,
    run_inline,
    shared_pacer,
    spending_from,
    sweep_seeds,
    upload_to_s3,
    with_seed,
)

assert_type(flux_prefect.__version__, str)


@flow
async def publish_one(request: ImageRequest, bucket: ImageBucket) -> PublishedImage:
    """The tasks, awaited one after another."""
    credentials = AimlApiCredentials.from_env()
    assert_type(await find_published(request, bucket, credentials), PublishedImage | None)
    generation = await generate_image(request, credentials)
    assert_type(generation, Generation)
    file = await download_image(generation, credentials, index=0)
    assert_type(file, ImageFile)
    assert_type(file.path, Path)
    published = await upload_to_s3(file, bucket)
    assert_type(published, PublishedImage)
    return published


@flow
def generate_some(requests: list[ImageRequest], credentials: AimlApiCredentials) -> None:
    """The tasks from a sync flow: arguments are checked. Prefect annotates a future with an async task's coroutine."""
    first = generate_image.submit(requests[0], credentials)
    assert_type(first, PrefectFuture[Coroutine[Any, Any, Generation]])
    futures = generate_image.map(requests, credentials)
    assert_type(futures, PrefectFutureList[Coroutine[Any, Any, Generation]])


async def use_the_pipeline(request: ImageRequest, bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """One image's whole path, under a budget, with its errors typed."""
    budget = Budget(default_price=200_000, max_credits=1_000_000)
    with spending_from(budget):
        production = await produce_image(with_seed(request, "run", "fox"), bucket, credentials, run=run_inline)
    assert_type(production, Production)
    assert_type(production.error, FluxError | None)
    assert_type(draw_seed("run", "fox"), int)
    async with HostLockManager().hold("key"):
        assert_type(PromptSeedCachePolicy(step="colour").step, str)


async def use_the_flows(bucket: ImageBucket) -> None:
    """The flows, called as functions: with an address, a block, or its name."""
    assert_type(await publish_image(ImageRequest(prompt="a fox"), "s3://images"), list[PublishedImage])
    report = await publish_batch([ImageRequest(prompt="a fox")], bucket, max_in_flight=4)
    assert_type(report, BatchReport)
    assert_type(report.read("failed"), Iterator[ItemRecord])
    assert_type(await sweep_seeds(["a fox"], "catalogue"), SweepReport)
    assert_type(await audit_bucket(report.manifest or "", bucket), AuditReport)
    try:
        assert_type(await backfill("prompts.csv", bucket, date(2026, 11, 1), date(2026, 11, 2)), BackfillReport)
    except BatchFailed as error:
        assert_type(error.report, BatchReport)
        assert_type(error.billed, Billed)
    except AuditFailed as error:
        assert_type(error.report, AuditReport)


async def read_the_tables() -> None:
    """Rows from a file and from an address."""
    for row in read_table("prompts.csv", only="failed"):
        assert_type(row, Row)
    async with open_table("s3://images/prompts.csv") as table:
        assert_type(next(table.rows()), Row)


async def use_the_client(credentials: AimlApiCredentials) -> None:
    """The service without Prefect."""
    pacer = shared_pacer(credentials.base_url, credentials.api_key, 16)
    async with AimlApiClient(api_key=credentials.api_key, base_url=credentials.base_url, pacer=pacer) as client:
        assert_type(client, AimlApiClient)
        assert_type(await client.balance(), Balance)
        image = await client.download("https://images", Path("fox.jpg"), expected="jpeg")
        assert_type(image, DownloadedImage)
        assert_type(image.format, Literal["jpeg", "png", "webp"])


def refused_by_a_checker(credentials: AimlApiCredentials) -> None:
    """Mistakes that a checker finds: each ignore below is an error of its own once it finds nothing."""
    ImageRequest(prompt="a fox", colour="red")  # type: ignore[call-arg]
    generate_image.submit("a fox", credentials)  # type: ignore[call-overload]
    flux_prefect.generate_images  # type: ignore[attr-defined] # noqa: B018
