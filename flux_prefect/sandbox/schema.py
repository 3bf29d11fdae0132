"""The body of POST /v1/images/generations, exactly as far as the service's OpenAPI document goes.

Deliberately not `ImageRequest`: that one is stricter, and the sandbox must take whatever the service takes.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flux_prefect.api.models import AspectRatio, SafetyTolerance

__all__ = ["GenerationBody", "SandboxModel", "explain"]

SandboxModel = Literal["flux/kontext-max/text-to-image", "flux/kontext-pro/text-to-image"]
"""The models that the sandbox serves."""

SIZES: dict[AspectRatio, tuple[int, int]] = {
    "21:9": (1568, 672),
    "16:9": (1392, 752),
    "4:3": (1184, 880),
    "3:2": (1248, 832),
    "1:1": (1024, 1024),
    "2:3": (832, 1248),
    "3:4": (880, 1184),
    "9:16": (752, 1392),
    "9:21": (672, 1568),
}
"""Pixels by aspect ratio. 21:9 and 1:1 are as the service's page shows, the others alike: one megapixel, by 16."""


def _present(value: Any) -> Any:
    if value is None:
        raise ValueError("null is not allowed: leave the field out")
    return value


def _integral(value: Any) -> Any:
    # To JSON Schema 7.0 is an integer, to a strict pydantic int it is not.
    return int(value) if isinstance(value, float) and value.is_integer() else _present(value)


class GenerationBody(BaseModel):
    """A request as the service understands it. Fields that it doesn't know are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    model: SandboxModel
    prompt: str = Field(max_length=4000)
    num_images: float = Field(default=1.0, ge=1, le=4)
    seed: Annotated[int | None, BeforeValidator(_integral), Field(ge=1)] = None
    guidance_scale: Annotated[float | None, BeforeValidator(_present), Field(ge=1, le=20)] = None
    safety_tolerance: SafetyTolerance = "2"
    output_format: Literal["jpeg", "png"] = "jpeg"
    aspect_ratio: AspectRatio = "16:9"

    @property
    def images(self) -> int:
        """How many images are made. The document calls the field a number, so 2.5 is allowed, and is 2."""
        return math.floor(self.num_images)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return SIZES[self.aspect_ratio]

    def digest(self, index: int) -> bytes:
        """32 bytes that decide image number `index`: every field takes part."""
        return hashlib.sha256(f"{index}\n{self.model_dump_json()}".encode()).digest()


def explain(error: ValidationError) -> str:
    """What is wrong with a body, field by field, without repeating its values."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    )
