"""Try several seeds of each prompt, then keep the chosen ones as a table that other flows publish from."""

from __future__ import annotations

from prefect import flow
from prefect.logging import get_run_logger

from flux_prefect import AspectRatio, BatchReport, publish_batch, sweep_seeds

ASPECT_RATIO: AspectRatio = "1:1"
"""Of what is tried and of what is published: another one would be another image."""


@flow
async def try_seeds(prompts: list[str], bucket: str, seeds: list[int], credentials: str | None = None) -> list[str]:
    """Publish every prompt with every seed, with a contact sheet a prompt to choose from.

    Args:
        prompts: What the images show.
        bucket: s3://name/prefix, or the name of a saved Image Bucket block.
        seeds: The seeds to try.
        credentials: The name of a saved AIMLAPI Credentials block. Empty: AIMLAPI_KEY of the environment.

    Returns:
        The s3:// addresses of the contact sheets.
    """
    report = await sweep_seeds(prompts, bucket, seeds=seeds, aspect_ratios=[ASPECT_RATIO], credentials=credentials)
    for prompt, sheet in report.sheets.items():
        get_run_logger().info("%s: choose from %s", prompt, sheet)
    return list(report.sheets.values())


@flow
async def publish_chosen(chosen: dict[str, int], bucket: str, credentials: str | None = None) -> BatchReport:
    """Publish the chosen seed of each prompt as one table: its manifest is the table that other flows read.

    Images that were published while seeds were tried in the same bucket and prefix cost nothing.

    Args:
        chosen: The seed that was chosen for each prompt.
        bucket: As for `try_seeds`.
        credentials: As for `try_seeds`.

    Returns:
        The report of the batch; its `manifest` is the table.
    """
    rows = [
        {"id": str(number), "prompt": prompt, "seed": seed, "aspect_ratio": ASPECT_RATIO}
        for number, (prompt, seed) in enumerate(chosen.items())
    ]
    return await publish_batch(rows, bucket, credentials)
