"""What the service says of its models: the price of an image, and which are deprecated or withdrawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux_prefect.api.models import CREDITS_PER_USD

__all__ = ["DEPRECATIONS_PATH", "MODELS_PATH", "Deprecation", "parse_deprecations", "parse_price"]

MODELS_PATH = "/v1/models"
DEPRECATIONS_PATH = "/v1/models/deprecations"


class Deprecation(BaseModel):
    """A model that the service is giving up, or has given up."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="The model's id.")
    status: Literal["deprecated", "superseded", "withdrawn"] = Field(
        description="withdrawn: it makes no more images. The others still do."
    )
    replaced_by: str | None = Field(default=None, description="The id of the model that takes its place, if any.")

    def __str__(self) -> str:
        return f"{self.model} is {self.status}" + (f", replaced by {self.replaced_by}" if self.replaced_by else "")


def parse_price(body: Any, model: str) -> float | None:
    """Read the price of one image of a model, in credits, from an answer of `MODELS_PATH`.

    None if it has none that can be read as such: a price of zero, or one by another unit than the image, is none.
    """
    for entry in _entries(body):
        pricing = entry.get("pricing")
        if entry.get("id") != model or not isinstance(pricing, Mapping) or pricing.get("unit", "image") != "image":
            continue
        for name, credits_each in (("credits", 1), ("usd", CREDITS_PER_USD)):
            amount = pricing.get(name)
            if isinstance(amount, (int, float)) and not isinstance(amount, bool) and 0 < amount < math.inf:
                return float(amount * credits_each)
    return None


def parse_deprecations(body: Any) -> dict[str, Deprecation]:
    """Read an answer of `DEPRECATIONS_PATH`, by model. Entries that can't be understood are left out."""
    found = {}
    for entry in _entries(body):
        try:
            deprecation = Deprecation.model_validate({**entry, "model": entry.get("model", entry.get("id"))})
        except ValidationError:
            continue
        found[deprecation.model] = deprecation
    return found


def _entries(body: Any) -> Iterator[Mapping[str, Any]]:
    entries = body.get("data") if isinstance(body, Mapping) else body
    return (entry for entry in (entries if isinstance(entries, list) else []) if isinstance(entry, Mapping))
