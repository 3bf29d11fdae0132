"""Prompts from templates: a table and a day in, the requests of that day out.

A prompt is a Jinja2 template. Its variables are the row's columns, `row` (all of them, for names with spaces in them)
and `day`, a date. Beside Jinja's own filters there are `day | weekday`, `day | month` and `day | season("south")`.
The same row and day always give the same request, so nothing is in reach that knows the clock or draws lots.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, TextIO

import anyio.to_thread
import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import (
    AspectRatio,
    GuidanceScale,
    ImageCount,
    OutputFormat,
    SafetyTolerance,
    TextToImageModel,
)
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import TemplateFailed
from flux_prefect.seeds import draw_day_seed
from flux_prefect.tables.formats import OWN_COLUMNS, UnreadableRow, describe_unstorable, read_csv, read_jsonl
from flux_prefect.tables.manifest_lines import is_record
from flux_prefect.tables.parquet import read_parquet
from flux_prefect.tables.sources import Source, open_source

__all__ = ["DEFAULT_IMAGE_SETTINGS", "ImageSettings", "RowRenderer", "render_table"]

MAX_PROMPT = 4000
"""The service's bound, in characters."""

_MAX_REPORTED = 20
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_SEASONS = ("winter", "spring", "summer", "autumn")
_CLOCKS = {"today", "fromtimestamp"}


class ImageSettings(BaseModel):
    """What a row's request is filled up with where the row has no value of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aspect_ratio: AspectRatio = Field(default="16:9", description="Width to height.")
    output_format: OutputFormat = Field(default="jpeg", description="The image's file format.")
    guidance_scale: GuidanceScale = None
    safety_tolerance: SafetyTolerance = Field(
        default="2", description="1 is the strictest, 5 and 6 are the most permissive."
    )
    num_images: ImageCount = 1
    model: TextToImageModel = Field(
        default="flux/kontext-max/text-to-image", description="The text-to-image model of the service."
    )


DEFAULT_IMAGE_SETTINGS = ImageSettings()
"""The service's own defaults."""


async def render_table(  # noqa: PLR0913 - keyword-only from the fourth on
    source: str | Path | Sequence[Mapping[str, Any]],
    day: date,
    target: Path,
    *,
    template: str | None = None,
    images: ImageSettings = DEFAULT_IMAGE_SETTINGS,
    bucket: ImageBucket | None = None,
) -> int:
    """Write the day's requests as JSON Lines, a row for every row of the table; returns how many.

    Every row is rendered before this returns, so that whoever pays afterwards pays for a table without gaps. A row's
    request depends on the row, the day, the template and the settings alone. A row without a seed gets the one of
    the day and its id; so rows without ids change their seeds where a row is put in before them.

    Takes half a millisecond a row, in a thread. Memory does not grow with the table.

    Args:
        source: as `batch.table.open_table` has it; no manifest. A file needs the column `prompt`, which may be empty.
        day: what `day` is in templates.
        target: the file to write.
        template: the prompt of rows whose own is empty.
        images: the other fields of the request where a row's own are empty.
        bucket: its keys and endpoint are used for a source in the same bucket.

    Raises:
        TableError: the table can't be read as a whole.
        TemplateFailed: rows can't be read or rendered: with their numbers.
    """
    renderer = RowRenderer(day, template, images)
    if isinstance(source, (str, Path)):
        async with open_source(source, bucket=bucket) as fetched:
            return await anyio.to_thread.run_sync(_write_rendered, renderer, _read(fetched), target)
    return await anyio.to_thread.run_sync(_write_rendered, renderer, enumerate(source, start=1), target)


class RowRenderer:
    """Makes rows of one day into requests.

    Args:
        day: the day.
        template: the prompt of rows whose own is empty.
        images: the other fields where a row's own are empty.

    Raises:
        TemplateFailed: the template is broken.
    """

    def __init__(self, day: date, template: str | None, images: ImageSettings) -> None:
        self._day = day
        self._environment = _make_environment()
        self._settings = images.model_dump(exclude_none=True)
        try:
            self._template = None if _is_blank(template) else self._environment.from_string(template or "")
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailed([f"template: {_explain(error)}"], 1) from error

    def render(self, number: int, content: Any) -> dict[str, Any]:
        """The row with its prompt rendered, all fields filled in, and the day in the column `day`.

        Columns of other names come along. Values of fields are not checked; that is the table's reader's part.

        Raises:
            ValueError: with what is wrong with it.
        """
        if isinstance(content, UnreadableRow):
            raise ValueError(content.reason)  # noqa: TRY004 - a row's reasons are all of one kind
        if is_record(content):
            raise ValueError("it is a record of a manifest: publish_batch takes those")
        if not isinstance(content, Mapping):
            raise ValueError("it is not an object with columns")  # noqa: TRY004 - as above
        content = dict(content)
        if "day" in content:
            raise ValueError("its column 'day' would hide the run's own day: rename it")
        if problem := describe_unstorable(content):
            raise ValueError(f"it {problem}")
        row_id = str(number) if _is_blank(content.get("id")) else str(content["id"]).strip()
        filled = {name: value for name, value in content.items() if name not in OWN_COLUMNS or not _is_blank(value)}
        return {
            **self._settings,
            "seed": draw_day_seed(self._day, row_id),
            **filled,
            "id": row_id,
            "prompt": self._render_prompt(content),
            "day": self._day.isoformat(),
        }

    def _render_prompt(self, content: Mapping[str, Any]) -> str:
        own = content.get("prompt")
        variables = {"row": content, **content, "day": self._day}
        try:
            template = self._template if _is_blank(own) else self._environment.from_string(str(own))
            prompt = None if template is None else _join(template.generate(variables)).strip()
        except Exception as error:  # a template can raise whatever its expressions do
            raise ValueError(_explain(error)) from error
        if prompt is None:
            raise ValueError("it has no prompt, and there is no template for all rows")
        if not prompt:
            raise ValueError("its prompt is blank when rendered")
        return prompt


class _Sandbox(ImmutableSandboxedEnvironment):
    """Keeps templates from the machine, and from the clock."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _CLOCKS and super().is_safe_attribute(obj, attr, value)


def _make_environment() -> _Sandbox:
    environment = _Sandbox(
        autoescape=False,  # prompts are text, and escaped where they are shown
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"weekday": _weekday, "month": _month, "season": _season}
    del environment.filters["random"], environment.globals["lipsum"]  # they draw lots
    return environment


def _printable(value: Any) -> Any:
    """What an expression prints: an empty cell nothing, whatever the table's format says for it."""
    if value is None:
        return ""
    if isinstance(value, (str, int, float, date, jinja2.Undefined)):
        return value
    # Some print their place in memory, which is another one tomorrow.
    raise TypeError(f"a {type(value).__name__} can't be printed: choose a part of it, or join it with | join(', ')")


def _weekday(day: date) -> str:
    return _WEEKDAYS[day.weekday()]


def _month(day: date) -> str:
    return _MONTHS[day.month - 1]


def _season(day: date, hemisphere: Literal["north", "south"] = "north") -> str:
    """The season by whole months, as meteorologists have it: March to May is spring in the north."""
    if hemisphere not in {"north", "south"}:
        raise ValueError(f"season({hemisphere!r}): write season('north') or season('south')")
    return _SEASONS[(day.month % 12 // 3 + (2 if hemisphere == "south" else 0)) % 4]


def _join(pieces: Iterator[str]) -> str:
    prompt = ""
    for piece in pieces:
        prompt += piece
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"its prompt has more than {MAX_PROMPT:,} characters when rendered")
    return prompt


def _explain(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno} of its template is broken ({error.message})"
    if isinstance(error, jinja2.UndefinedError):
        return f"its template asks for what the row has not: {error.message}"
    return str(error) or repr(error)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _read(source: Source) -> Iterator[tuple[int, Any]]:
    if source.format == "csv":
        return read_csv(source)
    return read_parquet(source) if source.format == "parquet" else read_jsonl(source)


def _write_rendered(renderer: RowRenderer, rows: Iterator[tuple[int, Any]], target: Path) -> int:
    with target.open("w", encoding="utf-8") as file:
        return _render_all(renderer, rows, file)


def _render_all(renderer: RowRenderer, rows: Iterator[tuple[int, Any]], file: TextIO) -> int:
    problems: list[str] = []
    good = bad = 0
    for number, content in rows:
        try:
            file.write(json.dumps(renderer.render(number, content), ensure_ascii=False) + "\n")
        except ValueError as error:
            bad += 1
            if bad <= _MAX_REPORTED:
                problems.append(f"row {number}: {error}")
        else:
            good += 1
    if bad:
        raise TemplateFailed(problems, bad)
    return good
