"""What a batch leaves in Prefect's UI: its progress while it runs, then a summary and a gallery.

Keys are the same in every run, so that Prefect's history shows run after run:

flux-progress   done of total, pace, credits, time left
flux-summary    counts, costs, what needs a person, where everything is
flux-gallery    the newest images, and in the place of those that are missing the reason

Text of tables and of the service stands inside blocks of HTML with no blank line in them, where markdown has no meaning
in either of Prefect's UIs; there only HTML needs escaping.
"""

from __future__ import annotations

import asyncio
import html
import re
import unicodedata
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar, get_args
from urllib.parse import quote, urlsplit
from uuid import UUID

import anyio
from prefect.artifacts import acreate_markdown_artifact, acreate_progress_artifact, aupdate_progress_artifact

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.display.gallery import publish_page
from flux_prefect.display.progress import Logger, Progress, describe_seconds
from flux_prefect.display.recent_records import PAGE
from flux_prefect.display.thumbnails import make_thumbnails
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.records import UNSUCCESSFUL, ItemRecord, ItemStatus
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.budget import describe_credits

__all__ = ["live_progress", "object_url", "publish_artifacts", "write_markdown_gallery", "write_summary"]

UPDATE_SECONDS = 10.0
"""Between two updates of a progress artifact: each costs the server some 40 milliseconds."""

_LAST_UPDATE_SECONDS = 5.0
_MOST_SECONDS = 60.0
_COLUMNS = 4
_MOST_OF_A_PROMPT = 160
_MOST_OF_A_MESSAGE = 240
_MOST_OF_AN_ID = 80
_UNBROKEN = re.compile(r"\S{20}(?=\S{4})")  # longer words would take the width of the other columns
_MOST_IDS = 50
_MOST_REASONS = 10

_Value = TypeVar("_Value")


@asynccontextmanager
async def live_progress(progress: Progress, logger: Logger, *, every: float = UPDATE_SECONDS) -> AsyncIterator[None]:
    """Keep a progress artifact of the enclosing flow run up to date while the block runs.

    In the background: neither a slow server nor one that refuses holds up or fails the block; what fails is tried again
    with the next update. When the block ends by itself there is a last update, which waits for the server five seconds
    at most; a warning tells where that failed.
    """
    ended = asyncio.Event()
    updates = asyncio.create_task(_update(progress, ended, every))
    try:
        yield
        ended.set()
        await asyncio.wait([updates], timeout=_LAST_UPDATE_SECONDS)
    finally:
        updates.cancel()
        (failure,) = await asyncio.gather(updates, return_exceptions=True)
    if failure is not None:
        reason = "the server took too long" if isinstance(failure, asyncio.CancelledError) else failure
        logger.warning("The progress artifact is out of date: %s", reason)


async def _update(progress: Progress, ended: asyncio.Event, every: float) -> None:
    artifact: UUID | None = None
    last = False
    while True:
        failure: Exception | None = None
        try:
            if artifact is None:
                artifact = await acreate_progress_artifact(progress.percent, "flux-progress", progress.summary())
            else:
                await aupdate_progress_artifact(artifact, progress.percent, progress.summary())
        except Exception as error:  # noqa: BLE001 - whatever it was, the batch goes on
            failure = error
        if last:
            if failure is not None:
                raise failure
            return
        with anyio.move_on_after(every):
            await ended.wait()
        last = ended.is_set()


async def publish_artifacts(
    report: BatchReport, newest: Sequence[ItemRecord], bucket: ImageBucket, spool: Spool, logger: Logger
) -> None:
    """Publish the page of a batch that has ended and leave its summary and its gallery at the enclosing flow run.

    What can't be done is warned of and left out: it never fails the run. Takes a minute each at most; a second or two
    for a thousand rows.

    Args:
        report: of the batch, with its manifest's address.
        newest: its newest records, the newest first.
        bucket: where it was published.
        spool: where images are that need no reading from the bucket.
        logger: of the run.
    """
    page, thumbnails = await asyncio.gather(
        _attempt("page of all images", publish_page(report, bucket), logger),
        _attempt("images in the gallery", draw_thumbnails(newest, bucket, spool), logger),
    )
    await asyncio.gather(
        _attempt("summary", show_summary(report, bucket, page), logger),
        _attempt("gallery", show_gallery(newest, thumbnails or {}, report, bucket, page), logger),
    )


async def _attempt(what: str, work: Awaitable[_Value], logger: Logger) -> _Value | None:
    try:
        with anyio.fail_after(_MOST_SECONDS):
            return await work
    except Exception as error:  # noqa: BLE001 - the images are published, whatever becomes of pages about them
        logger.warning("The %s is missing from this run's artifacts: %s", what, str(error) or repr(error))
        return None


async def show_summary(report: BatchReport, bucket: ImageBucket, page: str | None) -> None:
    """Leave the artifact `flux-summary` at the enclosing flow run.

    Args:
        report: of the batch.
        bucket: where it was published.
        page: the key of its page, where there is one.

    Raises:
        Exception: Prefect's server did not take it.
    """
    text = await anyio.to_thread.run_sync(write_summary, report, bucket, page)
    await acreate_markdown_artifact(text, "flux-summary", description=report.summary())


async def draw_thumbnails(records: Sequence[ItemRecord], bucket: ImageBucket, spool: Spool) -> dict[str, str]:
    """The thumbnails that a gallery of these records shows, as `data:` URIs by the images' s3:// addresses.

    Args:
        records: the newest first.
        bucket: where the images were published.
        spool: where images are that need no reading from the bucket.
    """
    images = list(islice((image for record in records for image in record.images), PAGE))
    thumbnails = await make_thumbnails(images, bucket, spool)
    return {image.uri: thumbnail for image, thumbnail in zip(images, thumbnails, strict=True) if thumbnail}


async def show_gallery(
    records: Sequence[ItemRecord],
    thumbnails: dict[str, str],
    report: BatchReport,
    bucket: ImageBucket,
    page: str | None,
) -> None:
    """Leave the artifact `flux-gallery` at the enclosing flow run: 48 images or reasons, under 1 MiB.

    Args:
        records: the newest first.
        thumbnails: `data:` URIs by the images' s3:// addresses.
        report: of the batch.
        bucket: where it was published.
        page: the key of the page with all of them, where there is one.

    Raises:
        Exception: Prefect's server did not take it.
    """
    text = write_markdown_gallery(records, thumbnails, report, bucket, page)
    await acreate_markdown_artifact(text, "flux-gallery", description=report.summary())


def write_markdown_gallery(
    records: Iterable[ItemRecord],
    thumbnails: dict[str, str],
    report: BatchReport,
    bucket: ImageBucket,
    page: str | None,
) -> str:
    """A page of images as markdown, the records in the order given, under 1 MiB whatever they hold.

    Args:
        records: what became of rows.
        thumbnails: `data:` URIs by the images' s3:// addresses.
        report: of the batch.
        bucket: where it was published.
        page: the key of the page with all of them, where there is one.
    """
    cells = list(islice(_cells(records, thumbnails, bucket), PAGE))
    rows = [f"<tr>{''.join(cells[place : place + _COLUMNS])}</tr>" for place in range(0, len(cells), _COLUMNS)]
    whole = [] if page is None else [f"<p>{_link(bucket, page, f'All {report.rows:,} rows on one page')}</p>", ""]
    return "\n".join([*whole, *_table(rows)])


def write_summary(report: BatchReport, bucket: ImageBucket, page: str | None) -> str:
    """A report as markdown for people: the sums, what needs a person, where everything is.

    Reads the records of failures; call it in a thread.
    """
    found = _Findings.of(report)
    pace = f"{60 * found.images / report.seconds:,.0f} images a minute" if report.seconds else ""
    lines = [
        *_facts(
            {
                "rows": f"{report.rows:,}",
                **{status: f"{report.count(status):,}" for status in get_args(ItemStatus) if report.count(status)},
                "calls billed": f"{report.billed_calls:,}",
                "sent and not billed": f"{report.unbilled_calls:,}" if report.unbilled_calls else "",
                "cost": describe_credits(report.credits_used),
                "cost not told": f"{report.unpriced_calls:,} calls" if report.unpriced_calls else "",
                "time": describe_seconds(report.seconds),
                "pace": pace if found.images else "",
                "page": "" if page is None else _link(bucket, page, f"s3://{bucket.bucket_name}/{page}"),
                "manifest": _escape(report.manifest or ""),
            }
        ),
    ]
    if found.failures:
        lines += ["### Without their images", "", *_facts(found.reasons())]
    if report.count("failed"):
        lines += ["To take up again what failed, run the manifest as the source with `only` set to `failed`.", ""]
    if report.billed_and_lost:
        lines += ["### Billed and lost", ""]
        lines += ["Paid for, and no image came. The service's support can look the calls up by these ids.", ""]
        lines += _list_ids(report.billed_and_lost)
    if report.possibly_billed:
        lines += ["### Possibly billed", ""]
        lines += ["The answer was lost. The service's log shows some minutes later whether they were charged.", ""]
        lines += _list_ids(report.possibly_billed)
    if report.reconciled is not None:
        lines += [f"<p>{_escape(report.reconciled)}</p>", ""]
    return "\n".join(lines)


def object_url(bucket: ImageBucket, key: str) -> str:
    """Where a browser finds an object: its public address, else the AWS console's page of it, else the server's URL."""
    path = quote(key)
    if bucket.public_base_url:
        return f"{bucket.public_base_url.rstrip('/')}/{path}"
    server = str(bucket.get_client().meta.endpoint_url).rstrip("/")
    if (urlsplit(server).hostname or "").endswith(".amazonaws.com"):
        return f"https://console.aws.amazon.com/s3/object/{bucket.bucket_name}?prefix={quote(key, safe='')}"
    return f"{server}/{bucket.bucket_name}/{path}"


def _cells(records: Iterable[ItemRecord], thumbnails: dict[str, str], bucket: ImageBucket) -> Iterator[str]:
    for record in records:
        for image in record.images:
            yield _cell(_image(image, thumbnails.get(image.uri), bucket), record, image)
        if record.message is not None:
            reason = (
                f'<strong>{record.status}</strong><div dir="auto">{_excerpt(record.message, _MOST_OF_A_MESSAGE)}</div>'
            )
            yield _cell(reason, record, None)


def _image(image: PublishedImage, thumbnail: str | None, bucket: ImageBucket) -> str:
    shown = "no thumbnail" if thumbnail is None else f'<img src="{thumbnail}" alt="image">'
    return f'<a href="{html.escape(object_url(bucket, image.key))}">{shown}</a>'


def _cell(shown: str, record: ItemRecord, image: PublishedImage | None) -> str:
    prompt = (
        "" if record.request is None else f'<div dir="auto">{_excerpt(record.request.prompt, _MOST_OF_A_PROMPT)}</div>'
    )
    # Bold, as one of the UIs drops <small>, which leaves nothing else to tell the line from the prompt.
    facts = [f"<strong>{_isolate(_excerpt(record.id, _MOST_OF_AN_ID))}</strong>"]
    if image is not None:
        facts.append(record.status)
    if record.request is not None:
        facts.append(f"seed {record.request.seed}")
    if record.credits_used:
        several = f" for {len(record.images)} images" if len(record.images) > 1 else ""
        facts.append(f"{record.credits_used:,.0f} credits{several}")
    return f'<td width="{100 // _COLUMNS}%" valign="top">{shown}{prompt}<small>{" · ".join(facts)}</small></td>'


@dataclass
class _Findings:
    """What only the records tell: the images made, and the kinds of failure with their numbers and an example."""

    images: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, report: BatchReport) -> _Findings:
        found = cls()
        for record in report.read(*UNSUCCESSFUL, "published"):
            found.images += sum(image.created for image in record.images)
            if record.status in UNSUCCESSFUL:
                kind = f"{record.status}: {record.error}"
                found.failures[kind] += 1
                message = _excerpt(record.message or "", _MOST_OF_A_MESSAGE)
                found.examples.setdefault(kind, f"{_isolate(_excerpt(record.id, _MOST_OF_AN_ID))}: {message}")
        return found

    def reasons(self) -> dict[str, str]:
        return {f"{n:,} {_escape(kind)}": self.examples[kind] for kind, n in self.failures.most_common(_MOST_REASONS)}


def _list_ids(ids: Sequence[str]) -> list[str]:
    more = f"<br>and {len(ids) - _MOST_IDS:,} more in the manifest" if len(ids) > _MOST_IDS else ""
    return [f"<p>{'<br>'.join(f'<code>{_escape(one)}</code>' for one in ids[:_MOST_IDS])}{more}</p>", ""]


def _facts(facts: dict[str, str]) -> list[str]:
    # A share of the width, as the addresses would take all but the longest word's from the names.
    rows = (f'<tr><td width="25%">{name}&ensp;</td><td>{value}</td></tr>' for name, value in facts.items() if value)
    return _table(list(rows))


def _table(rows: list[str]) -> list[str]:
    return ['<table cellpadding="4">', "<tbody>", *rows, "</tbody>", "</table>", ""] if rows else []


def _isolate(text: str) -> str:
    """HTML whose direction doesn't change that of what stands beside it. One of the UIs drops <bdi>."""
    return f'<span dir="auto">{text}</span>'


def _link(bucket: ImageBucket, key: str, text: str) -> str:
    return f'<a href="{html.escape(object_url(bucket, key))}">{_escape(text)}</a>'


def _excerpt(text: str, most: int) -> str:
    """The beginning of any text as HTML that breaks into lines; the page in the bucket has all of it."""
    line = _clean(text)
    shown = line if len(line) <= most else f"{line[: most - 1]}…"
    return html.escape(_UNBROKEN.sub("\\g<0>\u200b", shown))


def _escape(text: str) -> str:
    """Any text as HTML."""
    return html.escape(_clean(text))


def _clean(text: str) -> str:
    """The text as one line without what JSON or a database refuses: halves of characters, control characters."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" else char for char in line)
