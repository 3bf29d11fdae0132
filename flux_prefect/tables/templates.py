"""Rendering of prompt templates: one day's requests from a table.

A prompt is a Jinja2 template. Its variables are the row's columns, `row` (all columns, for names with spaces)
and `day`, a date. Besides Jinja's own filters there are `day | weekday`, `day | month` and `day | season("south")`.
The same row and day always result in the same request, so templates can use neither the clock nor random values.
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

from flux_prefect.api.models import ImageSettings
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import TemplateFailed
from flux_prefect.seeds import draw_day_seed
from flux_prefect.tables.formats import OWN_COLUMNS, UnreadableRow, describe_unstorable, read_csv, read_jsonl
from flux_prefect.tables.manifest_lines import is_record
from flux_prefect.tables.parquet import read_parquet
from flux_prefect.tables.sources import Source, open_source

__all__ = ["DEFAULT_IMAGE_SETTINGS", "RowRenderer", "render_table"]

MAX_PROMPT = 4000
"""The service's limit, in characters."""

_MAX_REPORTED = 20
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_SEASONS = ("winter", "spring", "summer", "autumn")
_CLOCKS = {"today", "fromtimestamp"}


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
    """Write the day's requests as JSON Lines, one line for each row of the table; returns the number of rows.

    All rows are rendered before this returns, so that nothing is paid for a table of which some rows can't be rendered.
    A row's request depends only on the row, the day, the template and the settings. A row without a seed gets one from
    the day and its id. A row without an id uses its number instead, so inserting a row before it changes its seed.

    Takes half a millisecond a row, in a thread. Memory does not grow with the table.

    Args:
        source: as for `open_table`, but not a manifest. A file needs the column `prompt`, which may be empty.
        day: the value of `day` in templates.
        target: the file to write.
        template: the prompt of rows whose own is empty.
        images: the other fields of the request, for rows where they are empty.
        bucket: its keys and endpoint are used for a source in the same bucket.

    Raises:
        TableError: the table can't be read as a whole.
        TemplateFailed: rows can't be read or rendered. The message has their numbers.
    """
    renderer = RowRenderer(day, template, images)
    if isinstance(source, (str, Path)):
        async with open_source(source, bucket=bucket) as fetched:
            return await anyio.to_thread.run_sync(_write_rendered, renderer, _read(fetched), target)
    return await anyio.to_thread.run_sync(_write_rendered, renderer, enumerate(source, start=1), target)


class RowRenderer:
    """Renders the rows of one day to requests.

    Args:
        day: the day.
        template: the prompt of rows whose own is empty.
        images: the other fields, for rows where they are empty.

    Raises:
        TemplateFailed: the template is broken.
    """

    def __init__(self, day: date, template: str | None, images: ImageSettings) -> None:
        self._day = day
        self._environment = make_environment()
        self._settings = images.model_dump(exclude_none=True)
        try:
            self._template = None if _is_blank(template) else self._environment.from_string(template or "")
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailed([f"template: {_explain(error)}"], 1) from error

    def render(self, number: int, content: Any) -> dict[str, Any]:
        """Render a row: its prompt rendered, all fields filled in, and the day in the column `day`.

        Other columns are copied. Values of fields are not checked; the table's reader does that.

        Raises:
            ValueError: the row can't be rendered. The message has the reason.
        """
        if isinstance(content, UnreadableRow):
            raise ValueError(content.reason)  # noqa: TRY004 - one exception type for every invalid row
        if is_record(content):
            raise ValueError("it is a manifest record: publish manifests with publish_batch")
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
        except Exception as error:  # a template's expressions can raise anything
            raise ValueError(_explain(error)) from error
        if prompt is None:
            raise ValueError("it has no prompt, and no template is set for all rows")
        if not prompt:
            raise ValueError("its rendered prompt is blank")
        return prompt


class _Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja2 sandbox that also blocks the clock."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _CLOCKS and super().is_safe_attribute(obj, attr, value)


def make_environment() -> ImmutableSandboxedEnvironment:
    """A Jinja2 environment whose results depend on the values alone: no clock, no random, no attributes of Python's."""
    environment = _Sandbox(
        autoescape=False,  # prompts are text, and escaped where they are shown
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"weekday": _weekday, "month": _month, "season": _season}
    del environment.filters["random"], environment.globals["lipsum"]  # their results are random
    return environment


def _printable(value: Any) -> Any:
    """The printed value of an expression. An empty cell prints nothing, in whichever format the table is."""
    if value is None:
        return ""
    if isinstance(value, (str, int, float, date, jinja2.Undefined)):
        return value
    # Some objects print their memory address, which changes from run to run.
    raise TypeError(f"a {type(value).__name__} can't be printed: select a part of it, or use | join(', ')")


def _weekday(day: date) -> str:
    return _WEEKDAYS[day.weekday()]


def _month(day: date) -> str:
    return _MONTHS[day.month - 1]


def _season(day: date, hemisphere: Literal["north", "south"] = "north") -> str:
    """The meteorological season, in whole months: March to May is spring in the north."""
    if hemisphere not in {"north", "south"}:
        raise ValueError(f"season({hemisphere!r}): write season('north') or season('south')")
    return _SEASONS[(day.month % 12 // 3 + (2 if hemisphere == "south" else 0)) % 4]


def _join(pieces: Iterator[str]) -> str:
    prompt = ""
    for piece in pieces:
        prompt += piece
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"its rendered prompt has more than {MAX_PROMPT:,} characters")
    return prompt


def _explain(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno} of its template is broken ({error.message})"
    if isinstance(error, jinja2.UndefinedError):
        return f"its template uses a column that the row does not have: {error.message}"
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
