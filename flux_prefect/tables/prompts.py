"""Prompts from the rows of any table: one renderer for products, feeds and other tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

from flux_prefect.errors import TableError
from flux_prefect.seeds import draw_seed
from flux_prefect.tables.cells import read_id, read_seed_id
from flux_prefect.tables.templates import PromptTemplate

__all__ = ["render_prompts", "write_rows"]


def render_prompts(
    rows: Iterable[Mapping[str, Any]], template: str, *, id_column: str = "id", seeds: str = "products", **fields: Any
) -> Iterator[dict[str, Any]]:
    """Render a row for `publish_batch` from each row of a table. Rows are rendered lazily; nothing is paid.

    A row's seed follows from its id: its image stays the same as long as its rendered prompt does.

    Args:
        rows: The table's rows. Their columns are the template's variables.
        template: The prompt, in Jinja2, sandboxed. A column that it prints and that is missing or null in a row is an
            error of that row.
        id_column: The column that identifies each row.
        seeds: What the seeds are drawn from, besides the id. Another text gives other seeds.
        fields: Other fields of every request, such as `aspect_ratio`.

    Raises:
        TableError: an id is missing or not unique, the template is broken, or a row can't be rendered.

    Example:
        ```python
        rows = [{"sku": "mug", "name": "stoneware mug"}]
        requests = list(render_prompts(rows, "a photograph of a {{ name }}", id_column="sku", aspect_ratio="1:1"))
        ```
    """
    try:
        compiled = PromptTemplate(template, prints_all=True)
    except jinja2.TemplateSyntaxError as error:
        raise TableError(f"template is broken: {error.message}.") from error
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if id_column not in row:
            raise TableError(f"id_column {id_column!r} is not a column of the table: {', '.join(map(str, row))}.")
        row_id = read_id(row[id_column])
        if not row_id or row_id in seen:
            raise TableError(f"Row {number} has no {id_column} of its own: {row_id!r}.")
        seen.add(row_id)
        try:
            prompt = compiled.render(row).strip()
        except ValueError as error:
            raise TableError(f"Row {number} ({row_id}) can't be rendered: {error}.") from error
        yield {"id": row_id, "prompt": prompt, "seed": draw_seed(seeds, read_seed_id(row[id_column])), **fields}


def write_rows(rows: Iterable[Mapping[str, Any]], target: Path) -> int:
    """Write rows as JSON Lines, for a `source` of `publish_batch`: a run's parameters may not be large.

    Returns:
        The number of rows.
    """
    count = 0
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    return count
