"""What a batch is going to do and what it can cost, before anything is paid for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.table import Table as Grid

from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import ImageRequest
from flux_prefect.batch.published_index import PublishedIndex
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.concurrency import for_each
from flux_prefect.errors import BalanceTooLow, FluxError, ServiceError
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.plan import Plan, describe_plan
from flux_prefect.money.budget import Budget, describe_credits
from flux_prefect.seeds import with_seed
from flux_prefect.steps import recover
from flux_prefect.tables.table import Row, Table

__all__ = ["PlannedBatch", "add_estimates", "check_balance", "make_plan", "tabulate_plan"]

_LOOKS_AT_ONCE = 32
_LISTED = 3000  # keys; a thousand are listed in the time of some fifteen looks


@dataclass
class PlannedBatch:
    """A plan, the table that it was made for, and what was found in the bucket on the way.

    Attributes:
        run: what the plan was made for.
        found: the images of requests that are whole in the bucket.
    """

    plan: Plan
    run: str
    found: PublishedIndex
    table: Table

    def rows(self) -> Iterator[Row]:
        """Every row of the table, read anew; a request without a seed gets the one that the plan gave it.

        Raises:
            TableError: the table has changed and can't be read to its end any more.
        """
        return _seeded(self.table, self.run)


async def make_plan(
    table: Table,
    bucket: ImageBucket,
    endpoint: str,
    budget: Budget,
    *,
    run: str,
) -> PlannedBatch:
    """Look through the whole table and the bucket; nothing is paid for.

    One HEAD an image, 32 at once. A bucket that holds little beside the table is listed first, and images that
    are not in the list are not looked for. Memory: some 300 bytes a row.

    Args:
        table: the table.
        bucket: where images would be published.
        endpoint: the root URL of the service.
        budget: the prices and caps.
        run: what seeds are drawn from for rows without one.

    Raises:
        TableError: the table can't be read to its end.
    """
    spool, found, wanted = Spool(), PublishedIndex(), set[str]()
    keys = await _list_keys(bucket)
    rows = invalid = repeats = paid = requests = images = 0
    most_credits = 0.0

    def unique() -> Iterator[tuple[str, ImageRequest]]:
        nonlocal rows, invalid, repeats
        for row in _seeded(table, run):
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

    def may_be_there(request: ImageRequest, fingerprint: str) -> bool:
        if keys is None:
            return True
        return all(bucket.key_of(request, fingerprint, index) in keys for index in range(request.num_images))

    async def look(item: tuple[str, ImageRequest]) -> None:
        nonlocal paid, requests, images, most_credits
        fingerprint, request = item
        there = await _find_all(request, fingerprint, bucket) if may_be_there(request, fingerprint) else None
        if there is not None:
            found.add(fingerprint, there)
        elif recover(request, endpoint, spool) is not None:
            paid += 1
        else:
            requests += 1
            images += request.num_images
            most_credits += budget.price_of(request).credits

    await for_each(unique(), look, at_once=_LOOKS_AT_ONCE)
    plan = Plan(
        rows=rows,
        invalid=invalid,
        published=len(found),
        repeats=repeats,
        paid=paid,
        requests=requests,
        images=images,
        most_credits=most_credits,
        max_credits=budget.max_credits,
        max_images=budget.max_images,
    )
    return PlannedBatch(plan, run, found, table)


async def add_estimates(plan: Plan, client: AimlApiClient, pace: float | None, max_in_flight: int) -> Plan:
    """The plan with the account's balance, where the service tells it, and the time it takes, where the pace is known.

    Args:
        plan: the sums.
        client: asks for the balance; one free call.
        pace: seconds that a generation takes.
        max_in_flight: paid calls at once.
    """
    try:
        balance = (await client.balance()).credits
    except ServiceError:
        balance = None  # not every endpoint tells; the cap holds all the same
    seconds = None if pace is None else math.ceil(plan.requests / max_in_flight) * pace
    return plan.model_copy(update={"balance": balance, "seconds": seconds})


def check_balance(plan: Plan) -> None:
    """Refuse a batch that the account can't pay for.

    Raises:
        BalanceTooLow: with both sums.
    """
    if plan.balance is not None and plan.balance < plan.spendable:
        raise BalanceTooLow(
            f"The batch may cost {describe_credits(plan.spendable)} and the account has "
            f"{describe_credits(plan.balance)}: top it up, or set max_credits to what it may spend. Nothing was sent."
        )


def tabulate_plan(plan: Plan) -> Grid:
    """The plan as a table for a terminal."""
    table = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("plan")
    table.add_column("", justify="right")
    for name, value in describe_plan(plan).items():
        table.add_row(name, value)
    return table


def _seeded(table: Table, run: str) -> Iterator[Row]:
    for row in table.rows():
        request = None if row.request is None else with_seed(row.request, run, row.id)
        yield Row(row.number, row.id, request, row.carried, row.error)


async def _list_keys(bucket: ImageBucket) -> frozenset[str] | None:
    try:
        return await bucket.list_keys(most=_LISTED)
    except FluxError:
        return None  # looking for each image needs fewer permissions


async def _find_all(request: ImageRequest, fingerprint: str, bucket: ImageBucket) -> list[PublishedImage] | None:
    """The images of a request where all of them are there."""
    try:
        images = [await bucket.find(request, fingerprint, index) for index in range(request.num_images)]
    except FluxError:
        return None  # the row's own work meets it again, before paying, and records it
    found = [image for image in images if image is not None]
    return found if len(found) == len(images) else None
