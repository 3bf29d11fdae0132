"""The work of a batch: rows in, records out, a bounded number at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import anyio

from flux_prefect.api.errors import FluxError
from flux_prefect.batch.report import (
    BatchReport,
    ItemRecord,
    record_failed,
    record_invalid,
    record_production,
)
from flux_prefect.batch.table import Row
from flux_prefect.bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.pipeline import produce_image
from flux_prefect.seeds import with_seed


async def run_batch(
    rows: Iterable[Row],
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    *,
    run: str,
    on_record: Callable[[ItemRecord], None],
) -> BatchReport:
    """Carry every row through, and tell of each as it ends.

    At most `credentials.max_in_flight` paid calls are out at once; as many items again may be downloading or
    uploading meanwhile. A row that fails never stops the others, unless it fails for a reason that every row shares
    (a wrong key, no credits left, no bucket): then nothing more is sent, and the rest is recorded as failed for it.

    Args:
        rows: pulled one by one as there is room for them.
        bucket: where to publish.
        credentials: who pays, and how many calls at once.
        run: what seeds are drawn from for rows without one.
        on_record: called with every record, in the order of their ends.
    """
    started = time.monotonic()
    records: list[ItemRecord] = []
    queue = iter(rows)
    stopped_by: FluxError | None = None

    async def work() -> None:
        nonlocal stopped_by
        for row in queue:
            if row.request is None:
                record = record_invalid(row)
            else:
                request = with_seed(row.request, run, row.id)
                if stopped_by is not None:
                    record = record_failed(row, request, stopped_by)
                else:
                    try:
                        production = await produce_image(request, bucket, credentials)
                    except Exception as error:  # noqa: BLE001 - whatever it was, the other rows go on
                        record = record_failed(row, request, error)
                    else:
                        record = record_production(row, production)
                        if production.error is not None and production.error.fatal:
                            stopped_by = production.error
            records.append(record)
            on_record(record)

    async with credentials.open_client(), anyio.create_task_group() as workers:
        for _ in range(2 * credentials.max_in_flight):
            workers.start_soon(work)
    return BatchReport(items=tuple(sorted(records, key=lambda record: record.row)), seconds=time.monotonic() - started)
