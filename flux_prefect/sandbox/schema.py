"""The body of POST /v1/images/generations, exactly as far as the service's OpenAPI documents go.

Deliberately not `ImageRequest`: that one is stricter, and the sandbox must take whatever the service takes. Fields and
bounds are the registry's, which a test holds to the documents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from flux_prefect.api.models import AspectRatio, OutputFormat, SizePreset
from flux_prefect.api.registry import MODELS, FluxModel, Size

__all__ = ["Dimensions", "GenerationBody", "IncomingBody", "Reference", "explain"]

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

_ULTRA: dict[AspectRatio, tuple[int, int]] = {
    **{ratio: (2 * width, 2 * height) for ratio, (width, height) in SIZES.items()},
    "16:9": (2752, 1536),
    "9:16": (1536, 2752),
}
"""Pixels of flux-pro/v1.1-ultra. 16:9 is as the service's page says, the others are four megapixels as well."""

_PRESETS: dict[SizePreset, tuple[int, int]] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}

_STEP = 32
"""The documents ask for multiples of 32 pixels in their text, not in their schemas: other sizes are rounded down."""


def _present(value: Any) -> Any:
    if value is None:
        raise ValueError("null is not allowed: leave the field out")
    return value


def _integral(value: Any) -> Any:
    # To JSON Schema 7.0 is an integer, to a strict pydantic int it is not.
    return int(value) if isinstance(value, float) and value.is_integer() else _present(value)


_Whole = Annotated[int, BeforeValidator(_integral)]


def _is_unset(value: Any) -> bool:
    return value is None or value == []


class Dimensions(BaseModel):
    """A width and a height in pixels."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    width: _Whole = 1024
    height: _Whole = 768


class _Lora(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    path: str
    scale: Annotated[float | None, BeforeValidator(_present)] = Field(default=None, exclude_if=_is_unset)


class Reference(BaseModel):
    """One reference image, as it was when the call came."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    sha256: str
    width: int
    height: int


class GenerationBody(BaseModel):
    """A request as the service understands it, with its model's defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    model: FluxModel
    prompt: str = Field(max_length=4000)
    num_images: float = 1.0
    seed: _Whole | None = None
    guidance_scale: float | None = None
    safety_tolerance: str | None = None
    output_format: OutputFormat | None = None
    aspect_ratio: AspectRatio | None = None
    image_size: Dimensions | str | None = Field(default=None, exclude_if=_is_unset)
    num_inference_steps: _Whole | None = Field(default=None, exclude_if=_is_unset)
    acceleration: str | None = Field(default=None, exclude_if=_is_unset)
    enable_prompt_expansion: bool | None = Field(default=None, exclude_if=_is_unset)
    enable_safety_checker: bool | None = Field(default=None, exclude_if=_is_unset)
    strength: float | None = Field(default=None, exclude_if=_is_unset)
    loras: list[_Lora] | None = Field(default=None, exclude_if=_is_unset)
    references: list[Reference] = Field(default=[], exclude_if=_is_unset)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults(cls, given: Any) -> Any:
        model = _model_of(given)
        return given if model is None else {**model.defaults, **given}

    @property
    def images(self) -> int:
        """How many images are made. The documents call the field a number, so 2.5 is allowed, and is 2."""
        return math.floor(self.num_images)

    @property
    def format(self) -> OutputFormat:
        """The format of the images; jpeg for models that have no such field."""
        return self.output_format or "jpeg"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels. An edit without a size has about the shape of its first reference image."""
        if isinstance(self.image_size, Dimensions):
            return self.image_size.width // _STEP * _STEP, self.image_size.height // _STEP * _STEP
        if self.image_size is None and self.references:
            shape = math.log(self.references[0].width / self.references[0].height)
            return min(SIZES.values(), key=lambda size: abs(math.log(size[0] / size[1]) - shape))
        if self.image_size is not None:
            return next(size for preset, size in _PRESETS.items() if preset == self.image_size)
        return (_ULTRA if self.model == "flux-pro/v1.1-ultra" else SIZES)[self.aspect_ratio or "1:1"]

    def digest(self, index: int) -> bytes:
        """32 bytes that decide image number `index`: every field takes part."""
        return hashlib.sha256(f"{index}\n{self.model_dump_json()}".encode()).digest()


class IncomingBody(GenerationBody):
    """A request as it comes, checked against its model's document. Fields that the model doesn't have are ignored."""

    image_url: str | list[str] = Field(default=[], exclude=True)
    image_urls: list[str] = Field(default=[], exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _as_documented(cls, given: Any) -> Any:
        model = _model_of(given)
        if model is None:
            return given
        names = {"model", "prompt", *model.fields}
        if model.references is not None:
            names.add(model.references.parameter)
            if model.references.parameter not in given:
                raise ValueError(f"{model.references.parameter} is required")
        taken = {name: value for name, value in given.items() if name in names}
        nulls = [name for name, value in taken.items() if value is None]
        if nulls:
            raise ValueError(f"{', '.join(nulls)}: null is not allowed: leave the field out")
        wrong = [name for name in ("sync_mode",) if "srpo" in model.id and not isinstance(given.get(name, False), bool)]
        if model.id == "flux-pro/v1.1-ultra" and given.get("raw", False) is not False:
            wrong.append("raw")
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not an allowed value")
        return taken

    @model_validator(mode="after")
    def _within_bounds(self) -> IncomingBody:
        model = MODELS[self.model]
        problems = []
        for name, spec in model.fields.items():
            value = getattr(self, name)
            # Multiples of 32 are asked for in the documents' text only.
            rule = replace(spec, step=1) if isinstance(spec, Size) else spec
            problem = None if value is None else rule.problem(value)
            if problem is not None:
                problems.append(f"{name}: {problem}")
        if model.references is not None:
            problems += self._of_references(model.references.parameter, model.references.most)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _of_references(self, name: str, most: int) -> list[str]:
        uris = getattr(self, name)
        if name == "image_url" and most == 1 and not isinstance(uris, str):
            return [f"{name}: must be one URL"]
        least = 1 if name == "image_urls" else 0
        if not isinstance(uris, str) and not least <= len(uris) <= most:
            return [f"{name}: must be {least} to {most} URLs"]
        return [f"{name}: is not a URI" for uri in self.uris if ":" not in uri][:1]

    @property
    def uris(self) -> list[str]:
        """Where the reference images are."""
        single = [self.image_url] if isinstance(self.image_url, str) else self.image_url
        return [*single, *self.image_urls]

    def with_references(self, references: list[Reference]) -> GenerationBody:
        """The request with its reference images instead of their addresses, which are stored nowhere."""
        return GenerationBody.model_validate(
            self.model_dump() | {"references": [reference.model_dump() for reference in references]}
        )


def _model_of(given: Any) -> Any:
    identity = given.get("model") if isinstance(given, Mapping) else None
    return MODELS.get(identity) if isinstance(identity, str) else None


def explain(error: ValidationError) -> str:
    """What is wrong with a body, field by field, without repeating its values."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    )
