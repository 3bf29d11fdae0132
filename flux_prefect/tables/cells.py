"""The meaning of cells: what spreadsheets and exports write for empty cells, whole numbers and choices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flux_prefect.api.registry import MODELS
from flux_prefect.tables.columns import FIELDS

__all__ = ["is_blank", "is_nothing", "read_fields", "read_id", "read_seed_id"]

_WHOLE = re.compile(r"([+-]?\d+)\.0")  # as pandas writes a column of whole numbers that has a gap
_CHOICES = {"aspect_ratio", "output_format", "safety_tolerance", "acceleration", "image_size"}
_SPELLINGS = {"jpg": "jpeg"}


def is_nothing(value: Any) -> bool:
    """Check whether a cell is empty: null, NaN or empty text."""
    return value is None or value == "" or (isinstance(value, float) and value != value)  # noqa: PLR0124 - NaN


def is_blank(value: Any) -> bool:
    """Check whether a cell is empty or holds only white space."""
    return is_nothing(value) or (isinstance(value, str) and not value.strip())


def read_id(value: Any) -> str:
    """Return a row's id as text, a whole number without its ".0"; empty if the row has none."""
    if is_blank(value):
        return ""
    return _whole(value.strip()) if isinstance(value, str) else str(_as_text(value))


def read_seed_id(value: Any) -> str:
    """Return the id that a row's seed is drawn from: as it is written, also "1.0": what is published is found."""
    return "" if is_blank(value) else str(value).strip()


def read_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request that a row sets. Empty cells, and NaN in any field but the prompt, set none.

    Prompts are unchanged. In all other fields spaces around a value do not count; in choices neither does its case, and
    whole numbers may be written as floats.
    """
    fields = {}
    for name, value in row.items():
        if name not in FIELDS or is_nothing(value):
            continue
        if name == "prompt":
            fields[name] = value
        elif (meant := _read(name, value)) is not None:
            fields[name] = meant
    return fields


def _read(name: str, value: Any) -> Any:
    if isinstance(value, str):
        value = value.strip()
        if not value or value.lower() == "nan":
            return None
    if name in _CHOICES:
        value = _as_text(value)
        if isinstance(value, str) and not value.startswith("{"):
            value = _SPELLINGS.get(value.lower(), value.lower())
    elif name == "model" and isinstance(value, str) and value.lower() in MODELS:
        value = value.lower()
    return value


def _as_text(value: Any) -> Any:
    """A number as text, a whole one without a fraction; all other values unchanged."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float)):
        return str(value)
    return _whole(value) if isinstance(value, str) else value


def _whole(text: str) -> str:
    whole = _WHOLE.fullmatch(text)
    return text if whole is None else whole[1]
