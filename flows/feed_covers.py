"""A cover for each new post of a JSON Feed. Run it every hour: posts that have their cover cost nothing."""

from __future__ import annotations

import httpx
from prefect import flow, task

from flux_prefect import BatchReport, publish_batch
from flux_prefect.tables.prompts import render_prompts


@task(retries=3, retry_delay_seconds=10)
async def read_posts(feed: str, most: int) -> list[dict[str, str]]:
    """Read the newest posts of a JSON Feed (https://www.jsonfeed.org/version/1.1/): their ids, titles and summaries."""
    async with httpx.AsyncClient(follow_redirects=True, timeout=30) as client:
        items = (await client.get(feed)).raise_for_status().json()["items"]
    return [
        {"id": str(item["id"]), "title": item.get("title") or "untitled", "summary": item.get("summary") or ""}
        for item in items[:most]
    ]


@flow
async def feed_covers(
    feed: str,
    bucket: str,
    template: str = "cover illustration for an article: {{ title }}. {{ summary }} No text, no letters.",
    most: int = 20,
    credentials: str | None = None,
    max_images: int | None = 20,
) -> BatchReport:
    """Publish a cover for each of the newest posts.

    Args:
        feed: The address of a JSON Feed.
        bucket: s3://name/prefix, or the name of a saved Image Bucket block.
        template: The prompt, in Jinja2; its variables are id, title and summary.
        most: How many of the newest posts to look at.
        credentials: The name of a saved AIMLAPI Credentials block. Empty: AIMLAPI_KEY of the environment.
        max_images: A hard cap on the covers that one run pays for.

    Returns:
        The report of the batch.
    """
    posts = await read_posts(feed, most)
    covers = list(render_prompts(posts, template, seeds=feed, aspect_ratio="16:9"))
    return await publish_batch(covers, bucket, credentials, max_images=max_images)
