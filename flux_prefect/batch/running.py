"""The work of a batch: rows in, records out, a bounded number at once."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import anyio

from flux_prefect.api.errors import FluxError
from flux_prefect.api.models import ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.batch.plan import PlannedBatch
from flux_prefect.batch.report import (
    BatchReport,
    ItemRecord,
    record_failed,
    record_invalid,
    record_production,
    record_skipped,
    record_stopped,
    record_unchanged,
)
from flux_prefect.batch.table import Row
from flux_prefect.bucket import ImageBucket
from flux_prefect.budget import Budget, spending_from
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.pipeline import produce_image
from flux_prefect.spool import Experience, Spool
from flux_prefect.steps import recover

_FILES_PER_ITEM = 4  # two locks, a connection, and the picture
_OTHER_FILES = 256  # Prefect's own, boto3's connections, everything else


async def run_batch(
    planned: PlannedBatch,
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    budget: Budget,
    *,
    on_record: Callable[[ItemRecord], None],
) -> BatchReport:
    """Carry every planned row through, and tell of each as it ends.

    At most `credentials.max_in_flight` paid calls are out at once; as many items again may be downloading or
    uploading meanwhile. A row that fails never stops the others, unless it fails for a reason that every row shares
    (a wrong key, no credits left, no bucket): then nothing more is sent, and the rest is recorded as failed for it.
    Once the budget has no room, the rows left are recorded as skipped, but for those that were paid for before.

    Args:
        planned: the rows, with what the plan found in the bucket.
        bucket: where to publish.
        credentials: who pays, and how many calls at once.
        budget: every paid call is reserved under it.
        on_record: called with every record, in the order of their ends.
    """
    started = time.monotonic()
    spool = Spool()
    records: list[ItemRecord] = []
    queue = iter(planned.rows)
    stopped_by: FluxError | None = None

    async def produce(row: Row, request: ImageRequest) -> ItemRecord:
        nonlocal stopped_by
        if stopped_by is not None:
            return record_stopped(row, stopped_by)
        if not budget.has_room(request) and recover(request, credentials.base_url, spool) is None:
            return record_skipped(row)
        try:
            production = await produce_image(request, bucket, credentials)
        except Exception as error:  # noqa: BLE001 - whatever it was, the other rows go on
            return record_failed(row, request, error)
        if production.error is not None and production.error.fatal:
            stopped_by = production.error
        return record_production(row, production)

    async def work() -> None:
        for row in queue:
            if row.request is None:
                record = record_invalid(row)
            else:
                images = planned.found.get(row.request.fingerprint(credentials.base_url))
                record = await produce(row, row.request) if images is None else record_unchanged(row, images)
            record = record.model_copy(update={"run": planned.run})
            records.append(record)
            on_record(record)

    _allow_open_files(_FILES_PER_ITEM * 2 * credentials.max_in_flight)
    with spending_from(budget):
        async with credentials.open_client(), anyio.create_task_group() as workers:
            for _ in range(2 * credentials.max_in_flight):
                workers.start_soon(work)
    records.sort(key=lambda record: record.row)
    return BatchReport(items=tuple(records), seconds=time.monotonic() - started, plan=planned.plan)


def _allow_open_files(needed: int) -> None:
    """Raise this process's soft limit where its own settings are what stands in the way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(needed + _OTHER_FILES, hard) if hard != resource.RLIM_INFINITY else needed + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def learn(known: Experience, report: BatchReport, budget: Budget, pacer: Pacer) -> Experience:
    """What the next batch at this endpoint can begin with: prices, pace and in-flight limit as this one found them."""
    # A limit that no refusal has lowered was only asked for, not learnt.
    in_flight = pacer.limit if pacer.limit < pacer.max_in_flight else None
    seconds = known.seconds
    if report.billed_calls:
        seconds = report.seconds * min(pacer.limit, report.billed_calls) / report.billed_calls
    return Experience(prices={**known.prices, **budget.observed}, seconds=seconds, in_flight=in_flight)
