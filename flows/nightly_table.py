"""A prompt table, published every night: what is published already costs nothing."""

from __future__ import annotations

from prefect import flow
from prefect.logging import get_run_logger

from flux_prefect import BatchReport, publish_batch


@flow
async def nightly_table(
    table: str,
    bucket: str,
    credentials: str | None = None,
    max_in_flight: int = 4,
    max_credits: float | None = 20_000_000,
) -> BatchReport:
    """Publish a table, and take up what an earlier night left unpublished.

    Args:
        table: A .csv, .jsonl or .parquet file (a path, s3://… or https://…) with the columns id, prompt and seed.
        bucket: s3://name/prefix, or the name of a saved Image Bucket block.
        credentials: The name of a saved AIMLAPI Credentials block. Empty: AIMLAPI_KEY of the environment.
        max_in_flight: Most paid calls at once.
        max_credits: A hard cap on what one night spends, in credits (2,000,000 to the US dollar).

    Returns:
        The report of the batch.
    """
    report = await publish_batch(
        table, bucket, credentials, max_in_flight=max_in_flight, max_credits=max_credits, max_failed=2
    )
    for record in report.read("failed", "flagged", "invalid"):
        get_run_logger().warning("%s: %s", record.id, record.message)
    return report
