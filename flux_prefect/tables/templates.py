"""Rendering of prompt templates: one day's requests from a table.

A prompt is a Jinja2 template. Its variables are the row's columns, `row` (all columns, for names with spaces)
and `day`, a date. Besides Jinja's own filters there are `day | weekday`, `day | month` and `day | season("south")`.
The same row and day always result in the same request, so templates can use neither the clock nor random values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TextIO
from uuid import UUID

import anyio.to_thread
import jinja2
from jinja2.filters import do_default
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flux_prefect.api.models import ImageSettings
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import TemplateFailed
from flux_prefect.seeds import draw_day_seed
from flux_prefect.tables.cells import is_blank, is_nothing, read_fields, read_id, read_seed_id
from flux_prefect.tables.columns import OWN_COLUMNS
from flux_prefect.tables.formats import UnreadableRow, describe_unstorable
from flux_prefect.tables.manifest_lines import is_record
from flux_prefect.tables.reading import Reading
from flux_prefect.tables.rows import read_rows
from flux_prefect.tables.sources import open_source

__all__ = ["DEFAULT_IMAGE_SETTINGS", "PromptTemplate", "RowRenderer", "render_table"]

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
_PLAIN = (Decimal, time, timedelta, UUID, bytes, list, tuple, dict)


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
    reading: Reading | None = None,
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
        reading: names the columns, and gets what is found on the way.

    Raises:
        TableError: the table can't be read as a whole.
        TemplateFailed: rows can't be read or rendered. The message has their numbers.
    """
    reading = reading or Reading()
    renderer = RowRenderer(day, template, images, reading)
    if isinstance(source, (str, Path)):
        async with open_source(source, bucket=bucket) as fetched:
            rows = read_rows(fetched, reading)
            return await anyio.to_thread.run_sync(_write_rendered, renderer, rows, target)
    return await anyio.to_thread.run_sync(_write_rendered, renderer, enumerate(source, start=1), target)


class PromptTemplate:
    """A prompt in Jinja2, sandboxed. The same values always make the same prompt: no clock, no random values.

    Args:
        text: the template.
        prints_all: whether lists, objects, decimals and prompts over the service's limit are rendered too.

    Raises:
        jinja2.TemplateSyntaxError: the text is broken.
    """

    def __init__(self, text: str, *, prints_all: bool = False) -> None:
        self._template = (_LENIENT_ENVIRONMENT if prints_all else _ENVIRONMENT).from_string(text)
        self._most = math.inf if prints_all else MAX_PROMPT

    def render(self, values: Mapping[str, Any]) -> str:
        """Render a row's prompt.

        Null and NaN are false in conditions, and `| default(…, true)` replaces them.

        Raises:
            ValueError: it can't be rendered: it prints a column that is null or missing, for example. The message has
                the column.
        """
        try:
            marked = {name: _mark_empty(name, value) for name, value in values.items()}
            return _join(self._template.generate(marked), self._most)
        except Exception as error:  # a template's expressions can raise anything
            raise ValueError(_explain(error)) from error


class RowRenderer:
    """Renders the rows of one day to requests.

    Args:
        day: the day.
        template: the prompt of rows whose own is empty.
        images: the other fields, for rows where they are empty.
        reading: names the columns.

    Raises:
        TemplateFailed: the template is broken.
    """

    def __init__(self, day: date, template: str | None, images: ImageSettings, reading: Reading | None = None) -> None:
        self._day = day
        self._reading = reading or Reading()
        self._settings = images.model_dump(exclude_none=True)
        try:
            self._template = None if is_blank(template) else PromptTemplate(template or "")
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
        if "day" in content:
            raise ValueError("its column 'day' would hide the run's own day: rename it")
        named = self._reading.apply(content)
        if problem := describe_unstorable({name: value for name, value in named.items() if not is_nothing(value)}):
            raise ValueError(f"it {problem}")
        row_id = read_id(named.get("id")) or str(number)
        fields = read_fields({name: value for name, value in named.items() if name != "prompt"})
        others = {
            name: None if is_nothing(value) and value != "" else value
            for name, value in named.items()
            if name not in OWN_COLUMNS
        }
        return {
            **self._settings,
            "seed": draw_day_seed(self._day, read_seed_id(named.get("id")) or row_id),
            **others,
            **fields,
            "id": row_id,
            "prompt": self._render_prompt({**content, **named}),
            "day": self._day.isoformat(),
        }

    def _render_prompt(self, content: Mapping[str, Any]) -> str:
        own = content.get("prompt")
        try:
            template = self._template if is_blank(own) else PromptTemplate(str(own))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(_explain(error)) from error
        if template is None:
            raise ValueError("it has no prompt, and no template is set for all rows")
        prompt = template.render({"row": content, **content, "day": self._day}).strip()
        if not prompt:
            raise ValueError("its rendered prompt is blank")
        return prompt


class _Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja2 sandbox that also blocks the clock."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _CLOCKS and super().is_safe_attribute(obj, attr, value)


class _Empty(jinja2.Undefined):
    """A column that is null in a row: false in conditions, an error where it is printed."""

    __slots__ = ()
    __str__ = jinja2.Undefined._fail_with_undefined_error  # noqa: SLF001 - how Jinja's own StrictUndefined does it

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Empty)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = jinja2.Undefined.__hash__


def _mark_empty(name: Any, value: Any) -> Any:
    """A value with `_Empty` for each null and NaN, also those within it."""
    if isinstance(value, Mapping):
        return {inner: _mark_empty(inner, content) for inner, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark_empty(name, content) for content in value]
    if isinstance(value, str) or not is_nothing(value):
        return value
    return _Empty(
        hint=f"the column {name!r} is empty in this row: fill it, or write {{% if {name} %}} around it", name=str(name)
    )


def _default(value: Any, default: Any = "", boolean: bool = False) -> Any:  # noqa: FBT001, FBT002 - Jinja's own
    """Jinja's filter, for which a null column is there."""
    return value if isinstance(value, _Empty) and not boolean else do_default(value, default, boolean)


def _is_defined(value: Any) -> bool:
    return isinstance(value, _Empty) or not isinstance(value, jinja2.Undefined)


def _make_environment(finalize: Callable[[Any], Any]) -> ImmutableSandboxedEnvironment:
    """A Jinja2 environment whose results depend on the values alone: no clock, no random, no attributes of Python's."""
    environment = _Sandbox(
        autoescape=False,  # prompts are text, and escaped where they are shown
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"weekday": _weekday, "month": _month, "season": _season}
    environment.filters |= {"default": _default, "d": _default}
    environment.tests |= {
        "none": lambda value: value is None or isinstance(value, _Empty),
        "defined": _is_defined,
        "undefined": lambda value: not _is_defined(value),
    }
    del environment.filters["random"], environment.globals["lipsum"]  # their results are random
    return environment


def _printable(value: Any) -> Any:
    if value is None or (isinstance(value, float) and is_nothing(value)):
        raise ValueError("its template prints a value that is empty: write {% if … %} around it")
    if isinstance(value, (str, int, float, date, jinja2.Undefined)):
        return value
    # Some objects print their memory address, which changes from run to run.
    raise TypeError(f"a {type(value).__name__} can't be printed: select a part of it, or use | join(', ')")


def _printable_or_plain(value: Any) -> Any:
    return str(_check_filled(value)) if isinstance(value, _PLAIN) else _printable(value)


def _check_filled(value: Any) -> Any:
    """A value, unless one within it is empty."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for content in inner:
        if isinstance(content, _Empty):
            str(content)  # raises its own error
        _check_filled(content)
    return value


def _weekday(day: date) -> str:
    return _WEEKDAYS[day.weekday()]


def _month(day: date) -> str:
    return _MONTHS[day.month - 1]


def _season(day: date, hemisphere: Literal["north", "south"] = "north") -> str:
    """The meteorological season, in whole months: March to May is spring in the north."""
    if hemisphere not in {"north", "south"}:
        raise ValueError(f"season({hemisphere!r}): write season('north') or season('south')")
    return _SEASONS[(day.month % 12 // 3 + (2 if hemisphere == "south" else 0)) % 4]


def _join(pieces: Iterator[str], most: float) -> str:
    prompt = ""
    for piece in pieces:
        prompt += piece
        if len(prompt) > most:
            raise ValueError(f"its rendered prompt has more than {most:,} characters")
    return prompt


def _explain(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno} of its template is broken ({error.message})"
    if isinstance(error, jinja2.UndefinedError) and "is empty in this row" in str(error):
        return str(error)
    if isinstance(error, jinja2.UndefinedError):
        return f"its template uses a column that the row does not have: {error.message}"
    return str(error) or repr(error)


_ENVIRONMENT = _make_environment(_printable)
_LENIENT_ENVIRONMENT = _make_environment(_printable_or_plain)


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
