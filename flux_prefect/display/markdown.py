"""Markdown of a batch's summary and gallery, for Prefect's UI.

Text from tables and from the service is placed inside blocks of HTML without blank lines. Neither of Prefect's UIs
reads markdown there, so only HTML is escaped.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import get_args
from urllib.parse import quote, urlsplit

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.display.progress import describe_seconds
from flux_prefect.display.recent_records import PAGE
from flux_prefect.manifest.records import UNSUCCESSFUL, ItemRecord, ItemStatus
from flux_prefect.manifest.report import BatchReport
from flux_prefect.money.budget import describe_credits

__all__ = ["object_url", "write_markdown_gallery", "write_summary"]

_COLUMNS = 4
_MAX_PROMPT = 160
_MAX_MESSAGE = 240
_MAX_ID = 80
_UNBROKEN = re.compile(r"\S{20}(?=\S{4})")  # longer words would widen their column at the expense of the others
_MAX_IDS = 50
_MAX_REASONS = 10


def write_markdown_gallery(
    records: Iterable[ItemRecord],
    thumbnails: dict[str, str],
    report: BatchReport,
    bucket: ImageBucket,
    page: str | None,
) -> str:
    """Write a gallery as markdown, in the order of the records. It is under 1 MiB, whatever the records contain.

    Args:
        records: the records to show.
        thumbnails: `data:` URIs by the images' s3:// addresses.
        report: the batch's report.
        bucket: the bucket that the batch was published to.
        page: the key of the page with all rows, or None.
    """
    cells = list(islice(_cells(records, thumbnails, bucket), PAGE))
    rows = [f"<tr>{''.join(cells[place : place + _COLUMNS])}</tr>" for place in range(0, len(cells), _COLUMNS)]
    link = [] if page is None else [f"<p>{_link(bucket, page, f'All {report.rows:,} rows on one page')}</p>", ""]
    return "\n".join([*link, *_table(rows)])


def write_summary(report: BatchReport, bucket: ImageBucket, page: str | None) -> str:
    """Write a report as markdown: the sums, problems that need attention, and addresses of the results.

    Reads the records of failures and published images from disk: call it in a thread.
    """
    found = _Outcomes.of(report)
    pace = f"{60 * found.images / report.seconds:,.0f} images a minute" if report.seconds else ""
    lines = [
        *_facts(
            {
                "rows": f"{report.rows:,}",
                **{status: f"{report.count(status):,}" for status in get_args(ItemStatus) if report.count(status)},
                "calls billed": f"{report.billed_calls:,}",
                "sent and not billed": f"{report.unbilled_calls:,}" if report.unbilled_calls else "",
                "cost": describe_credits(report.credits_used),
                "cost unknown": f"{report.unpriced_calls:,} calls" if report.unpriced_calls else "",
                "time": describe_seconds(report.seconds),
                "pace": pace if found.images else "",
                "page": "" if page is None else _link(bucket, page, f"s3://{bucket.bucket_name}/{page}"),
                "manifest": _escape(report.manifest or ""),
            }
        ),
    ]
    if found.failures:
        lines += ["### Rows without images", "", *_facts(found.reasons())]
    if report.count("failed"):
        lines += ["To run the failed rows again, use the manifest as the source, with `only` set to `failed`.", ""]
    if report.billed_and_lost:
        lines += ["### Billed and lost", ""]
        lines += ["These calls were paid for and returned no image. The service's support can find them by id.", ""]
        lines += _list_ids(report.billed_and_lost)
    if report.possibly_billed:
        lines += ["### Possibly billed", ""]
        lines += ["The answers were lost. The service's log shows after some minutes which calls were billed.", ""]
        lines += _list_ids(report.possibly_billed)
    if report.reconciled is not None:
        lines += [f"<p>{_escape(report.reconciled)}</p>", ""]
    return "\n".join(lines)


def object_url(bucket: ImageBucket, key: str) -> str:
    """Make an object's URL for a browser: its public address, its page in the AWS console, or the server's URL."""
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
            reason = f'<strong>{record.status}</strong><div dir="auto">{_excerpt(record.message, _MAX_MESSAGE)}</div>'
            yield _cell(reason, record, None)


def _image(image: PublishedImage, thumbnail: str | None, bucket: ImageBucket) -> str:
    shown = "no thumbnail" if thumbnail is None else f'<img src="{thumbnail}" alt="image">'
    return f'<a href="{html.escape(object_url(bucket, image.key))}">{shown}</a>'


def _cell(shown: str, record: ItemRecord, image: PublishedImage | None) -> str:
    prompt = "" if record.request is None else f'<div dir="auto">{_excerpt(record.request.prompt, _MAX_PROMPT)}</div>'
    # Bold, because one of the UIs drops <small>, and nothing else sets the line apart from the prompt.
    facts = [f"<strong>{_isolate(_excerpt(record.id, _MAX_ID))}</strong>"]
    if image is not None:
        facts.append(record.status)
    if record.request is not None:
        facts.append(f"seed {record.request.seed}")
    if record.credits_used:
        several = f" for {len(record.images)} images" if len(record.images) > 1 else ""
        facts.append(f"{record.credits_used:,.0f} credits{several}")
    return f'<td width="{100 // _COLUMNS}%" valign="top">{shown}{prompt}<small>{" · ".join(facts)}</small></td>'


@dataclass
class _Outcomes:
    """The sums that need the records: images made, and the kinds of failure, each with its count and an example."""

    images: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, report: BatchReport) -> _Outcomes:
        found = cls()
        for record in report.read(*UNSUCCESSFUL, "published"):
            found.images += sum(image.created for image in record.images)
            if record.status in UNSUCCESSFUL:
                kind = f"{record.status}: {record.error}"
                found.failures[kind] += 1
                message = _excerpt(record.message or "", _MAX_MESSAGE)
                found.examples.setdefault(kind, f"{_isolate(_excerpt(record.id, _MAX_ID))}: {message}")
        return found

    def reasons(self) -> dict[str, str]:
        return {f"{n:,} {_escape(kind)}": self.examples[kind] for kind, n in self.failures.most_common(_MAX_REASONS)}


def _list_ids(ids: Sequence[str]) -> list[str]:
    more = f"<br>and {len(ids) - _MAX_IDS:,} more in the manifest" if len(ids) > _MAX_IDS else ""
    return [f"<p>{'<br>'.join(f'<code>{_escape(one)}</code>' for one in ids[:_MAX_IDS])}{more}</p>", ""]


def _facts(facts: dict[str, str]) -> list[str]:
    # A fixed share of the width: long addresses would narrow the column of names to its longest word.
    rows = (f'<tr><td width="25%">{name}&ensp;</td><td>{value}</td></tr>' for name, value in facts.items() if value)
    return _table(list(rows))


def _table(rows: list[str]) -> list[str]:
    return ['<table cellpadding="4">', "<tbody>", *rows, "</tbody>", "</table>", ""] if rows else []


def _isolate(text: str) -> str:
    """HTML of a text whose direction does not affect the text beside it. One of the UIs drops <bdi>."""
    return f'<span dir="auto">{text}</span>'


def _link(bucket: ImageBucket, key: str, text: str) -> str:
    return f'<a href="{html.escape(object_url(bucket, key))}">{_escape(text)}</a>'


def _excerpt(text: str, most: int) -> str:
    """The start of a text as HTML, with breaks in long words. The page in the bucket has the full text."""
    line = _clean(text)
    shown = line if len(line) <= most else f"{line[: most - 1]}…"
    return html.escape(_UNBROKEN.sub("\\g<0>\u200b", shown))


def _escape(text: str) -> str:
    """A text as one line of HTML."""
    return html.escape(_clean(text))


def _clean(text: str) -> str:
    """The text as one line without lone surrogates and control characters, which JSON or a database would reject."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" else char for char in line)
