"""The plan of a batch: what it will do and what it can cost, before anything is paid for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from rich import box
from rich.table import Table as Grid

from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import ImageRequest
from flux_prefect.batch.context import BatchContext, uncapped_budget
from flux_prefect.batch.published_index import PublishedIndex
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.concurrency import for_each
from flux_prefect.custody import recover
from flux_prefect.errors import BalanceTooLow, FluxError, ModelWithdrawn, ServiceError, TooManyCombinations
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.plan import Plan, describe_plan
from flux_prefect.money.budget import Budget, describe_credits
from flux_prefect.seeds import with_seed
from flux_prefect.tables.reading import Reading
from flux_prefect.tables.table import Row, Table

__all__ = [
    "PlannedBatch",
    "add_estimates",
    "add_model_facts",
    "check_balance",
    "check_combinations",
    "make_plan",
    "open_plan",
    "seeded_rows",
    "tabulate_plan",
]

_LOOKUPS_AT_ONCE = 32
_MAX_LISTED_KEYS = 3000  # a thousand keys are listed in the time of about fifteen lookups


@dataclass
class PlannedBatch:
    """A plan, its table and the published images that were found for it.

    Attributes:
        plan: the sums.
        run: id of the run; seeds of rows without one are drawn from it.
        found: the published images of complete requests.
        table: the table.
        images: the number of images to pay for, by model.
    """

    plan: Plan
    run: str
    found: PublishedIndex
    table: Table
    images: Mapping[str, int] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Read every row of the table again, each request with the seed that the plan assigned.

        Raises:
            TableError: the table has changed and can't be read completely any more.
        """
        return seeded_rows(self.table, self.run)


@asynccontextmanager
async def open_plan(context: BatchContext, table: Table, *, run: str) -> AsyncIterator[PlannedBatch]:
    """Plan a batch, with the balance and the duration, and keep what was found for the block. Nothing is paid for.

    Args:
        context: bucket, account, client and budget of the batch.
        table: the table.
        run: id of the run; seeds of rows without one are drawn from it.

    Raises:
        TableError: the table can't be read completely.
        ModelWithdrawn: the service no longer serves a model that would be paid for.
    """
    planned = await make_plan(table, context.bucket, context.account.base_url, context.budget, run=run)
    try:
        planned.plan = await add_model_facts(planned, context.client, context.budget)
        planned.plan = await add_estimates(
            planned.plan, context.client, context.experience.seconds, context.account.max_in_flight
        )
        yield planned
    finally:
        planned.found.close()


async def make_plan(
    table: Table,
    bucket: ImageBucket,
    endpoint: str,
    budget: Budget,
    *,
    run: str,
) -> PlannedBatch:
    """Plan a batch by reading the whole table and the bucket. Nothing is paid for.

    One HEAD an image, 32 at once. A bucket with few keys is listed first, and images that are not in the list are not
    looked up. Memory: some 300 bytes a row.

    Args:
        table: the table.
        bucket: the bucket to publish to.
        endpoint: the root URL of the service.
        budget: the prices and caps.
        run: id of the run; seeds of rows without one are drawn from it.

    Raises:
        TableError: the table can't be read completely.
    """
    spool, found, wanted = Spool(), PublishedIndex(), set[str]()
    keys = await _list_keys(bucket)
    rows = invalid = repeats = paid = requests = 0
    images = Counter[str]()
    reading = table.new_reading()

    def unique_requests() -> Iterator[tuple[str, ImageRequest]]:
        nonlocal rows, invalid, repeats
        for row in seeded_rows(table, run, reading):
            rows += 1
            if row.request is None:
                invalid += 1
                continue
            fingerprint = row.request.fingerprint(endpoint)
            if fingerprint in wanted:
                repeats += 1
                continue
            wanted.add(fingerprint)
            yield fingerprint, row.request

    def may_be_published(request: ImageRequest, fingerprint: str) -> bool:
        if keys is None:
            return True
        return all(bucket.key_of(request, fingerprint, index) in keys for index in range(request.num_images))

    async def look_up(item: tuple[str, ImageRequest]) -> None:
        nonlocal paid, requests
        fingerprint, request = item
        images_found = await _find_all(request, fingerprint, bucket) if may_be_published(request, fingerprint) else None
        if images_found is not None:
            found.add(fingerprint, images_found)
        elif recover(request, endpoint, spool) is not None:
            paid += 1
        else:
            requests += 1
            images[request.model] += request.num_images

    await for_each(unique_requests(), look_up, at_once=_LOOKUPS_AT_ONCE)
    plan = Plan(
        rows=rows,
        invalid=invalid,
        published=len(found),
        repeats=repeats,
        paid=paid,
        requests=requests,
        images=images.total(),
        most_credits=_most_credits(images, budget),
        max_credits=budget.max_credits,
        max_images=budget.max_images,
        table=reading.describe(),
        warnings=reading.warnings,
    )
    return PlannedBatch(plan, run, found, table, images)


async def add_model_facts(planned: PlannedBatch, client: AimlApiClient, budget: Budget) -> Plan:
    """Return the plan with the service's own prices, and warnings of models that it is giving up.

    One free request a model to pay for, and one for the list of deprecations. What the service does not answer stays
    as it was: the prices that this host has paid, else `FLUX_PREFECT_CREDITS_PER_IMAGE`. The budget has the prices too.

    Raises:
        ModelWithdrawn: the service no longer serves a model that would be paid for.
    """
    if not planned.images:
        return planned.plan
    try:
        for model in planned.images:
            price = await client.price(model)
            if price is not None:
                budget.quote(model, price)
    except ServiceError:
        pass  # not every endpoint has the list
    try:
        listed = await client.deprecations()
    except ServiceError:
        listed = {}
    found = [listed[model] for model in planned.images if model in listed]
    withdrawn = "; ".join(str(deprecation) for deprecation in found if deprecation.status == "withdrawn")
    if withdrawn:
        raise ModelWithdrawn(f"{withdrawn}. Set another model in the table. Nothing was sent.")
    warnings = tuple(f"{deprecation}: change the model before it is withdrawn" for deprecation in found)
    most = _most_credits(planned.images, budget)
    return planned.plan.model_copy(update={"most_credits": most, "warnings": (*planned.plan.warnings, *warnings)})


async def add_estimates(plan: Plan, client: AimlApiClient, pace: float | None, max_in_flight: int) -> Plan:
    """Return the plan with the account's balance, if the service reports it, and the duration, if the pace is known.

    Args:
        plan: the plan.
        client: a client of the account; one free request for the balance.
        pace: seconds that a generation takes, or None.
        max_in_flight: the most paid calls at once.
    """
    try:
        balance = (await client.balance()).credits
    except ServiceError:
        balance = None  # not every endpoint reports it; the cap applies anyway
    seconds = None if pace is None else math.ceil(plan.requests / max_in_flight) * pace
    return plan.model_copy(update={"balance": balance, "seconds": seconds})


def check_balance(plan: Plan) -> None:
    """Verify that the account can pay for a batch.

    Raises:
        BalanceTooLow: it can't; the message has both sums.
    """
    if plan.balance is not None and plan.balance < plan.spendable:
        raise BalanceTooLow(
            f"The batch may cost {describe_credits(plan.spendable)} and the account has "
            f"{describe_credits(plan.balance)}: top it up, or set max_credits to what it may spend. Nothing was sent."
        )


def check_combinations(requests: Sequence[ImageRequest], most: int, endpoint: str) -> None:
    """Verify that a sweep has no more images than it may have.

    Raises:
        TooManyCombinations: it has more; the message has their number and cost.
    """
    if len(requests) > most:
        budget = uncapped_budget(endpoint)
        cost = describe_credits(sum(budget.price_of(request).credits for request in requests))
        raise TooManyCombinations(
            f"The lists make {len(requests):,} images, at most {cost}, and max_combinations is {most}: "
            "shorten a list, or raise max_combinations. Nothing was sent."
        )


def tabulate_plan(plan: Plan) -> Grid:
    """Format a plan as a table for the terminal."""
    table = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("plan")
    table.add_column("", overflow="fold")
    for name, value in describe_plan(plan).items():
        table.add_row(name, value)
    return table


def _most_credits(images: Mapping[str, int], budget: Budget) -> float:
    return sum(budget.image_price(model) * number for model, number in images.items())


def seeded_rows(table: Table, run: str, reading: Reading | None = None) -> Iterator[Row]:
    """Read a table's rows, each request with its own seed or the one drawn for this run."""
    for row in table.rows(reading):
        request = None if row.request is None else with_seed(row.request, run, row.seed_id or row.id)
        yield Row(row.number, row.id, request, row.carried, row.error)


async def _list_keys(bucket: ImageBucket) -> frozenset[str] | None:
    try:
        return await bucket.list_keys(most=_MAX_LISTED_KEYS)
    except FluxError:
        return None  # looking up each image needs fewer permissions


async def _find_all(request: ImageRequest, fingerprint: str, bucket: ImageBucket) -> list[PublishedImage] | None:
    """Return the images of a request if all of them are published."""
    try:
        images = [await bucket.find(request, fingerprint, index) for index in range(request.num_images)]
    except FluxError:
        return None  # the row meets the same error before paying, and records it
    found = [image for image in images if image is not None]
    return found if len(found) == len(images) else None
