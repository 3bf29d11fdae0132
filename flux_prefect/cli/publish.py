"""`flux-prefect publish`: one image, a table, a table over many workers, one day of a table of templates."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from rich.console import RenderableType

from flux_prefect.api.models import ImageRequest, ImageSettings
from flux_prefect.batch.planning import tabulate_plan
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.cli.flow_commands import Extra, FlowCommand, Given, one_line
from flux_prefect.display.gallery import write_gallery
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.flows.publish_daily import publish_daily
from flux_prefect.flows.publish_image import publish_image
from flux_prefect.flows.publish_sharded import publish_sharded
from flux_prefect.manifest.report import BatchReport, tabulate

__all__ = ["batch", "batch_to_json", "daily", "image", "sharded", "show_batch"]


def show_batch(state: State[Any], report: BatchReport, given: Given) -> Iterator[RenderableType]:
    """A batch's plan or what became of its rows, and the files that were asked for."""
    yield tabulate_plan(report.plan) if given["dry_run"] and report.plan is not None else tabulate(report)
    if given.get("report") is not None:
        given["report"].parent.mkdir(parents=True, exist_ok=True)
        given["report"].write_text(json.dumps(batch_to_json(report), indent=2, ensure_ascii=False), encoding="utf-8")
    if given.get("gallery") is not None:
        yield f"Gallery: {asyncio.run(_write_gallery(report, given['bucket'], given['gallery']))}"
    if state.is_completed():
        yield one_line(state)


def batch_to_json(report: BatchReport) -> dict[str, Any]:
    """A batch's report with the record of every row."""
    return {**report.model_dump(mode="json"), "items": [item.model_dump(mode="json") for item in report.read()]}


async def _write_gallery(report: BatchReport, bucket: str, folder: Path) -> Path:
    return await write_gallery(report, await ImageBucket.resolve(bucket), folder, title=f"Published to {bucket}")


def _show_images(state: State[Any], images: list[PublishedImage], _given: Given) -> Iterator[RenderableType]:
    """The addresses on stdout, for scripts, and the cost on stderr."""
    for each in images:
        yield each.uri if each.url is None else f"{each.uri}  {each.url}"
    cost = (state.message or "").removeprefix(f"{images[0].uri}, ")
    print(f"Cost of this run: {cost}", file=sys.stderr)


def _images_to_json(images: list[Any]) -> dict[str, Any]:
    return {"images": [each.model_dump(mode="json") for each in images]}


_FILES = {
    "gallery": Extra(Path | None, None, "Write a page with the images to this folder."),
    "report": Extra(Path | None, None, "Write the report with the record of every row to this file, as JSON."),
}

image = FlowCommand(
    publish_image, first="prompt", show=_show_images, to_json=_images_to_json, models={"request": ImageRequest}
).build()

batch = FlowCommand(publish_batch, first="source", show=show_batch, to_json=batch_to_json, extras=_FILES).build()

sharded = FlowCommand(publish_sharded, first="source", show=show_batch, to_json=batch_to_json, extras=_FILES).build()

daily = FlowCommand(
    publish_daily,
    first="source",
    show=show_batch,
    to_json=batch_to_json,
    models={"images": ImageSettings},
    extras=_FILES,
).build()
