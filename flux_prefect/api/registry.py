"""The service's FLUX models: the fields that each one takes, with bounds and defaults.

One entry a model. Source: the service's OpenAPI documents in `tests/data/models`, one a model; a test compares every
entry with its document, field for field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

__all__ = [
    "MODELS",
    "Choice",
    "EditModel",
    "FieldSpec",
    "Flag",
    "FluxModel",
    "Loras",
    "Model",
    "Number",
    "References",
    "Size",
    "TextToImageModel",
    "models_that_take",
]

TextToImageModel = Literal[
    "flux/kontext-max/text-to-image",
    "flux/kontext-pro/text-to-image",
    "flux-pro",
    "flux-pro/v1.1",
    "flux-pro/v1.1-ultra",
    "flux-realism",
    "flux/dev",
    "flux/schnell",
    "flux/srpo",
    "blackforestlabs/flux-2",
    "blackforestlabs/flux-2-pro",
    "blackforestlabs/flux-2-max",
    "blackforestlabs/flux-2-lora",
]
"""The models that make an image from a prompt alone."""

EditModel = Literal[
    "flux/kontext-max/image-to-image",
    "flux/kontext-pro/image-to-image",
    "flux/dev/image-to-image",
    "flux/srpo/image-to-image",
    "blackforestlabs/flux-2-edit",
    "blackforestlabs/flux-2-pro-edit",
    "blackforestlabs/flux-2-lora-edit",
]
"""The models that make an image from a prompt and reference images."""

FluxModel: TypeAlias = TextToImageModel | EditModel


class FieldSpec(Protocol):
    """What a model allows in one field."""

    @property
    def default(self) -> Any:
        """The service's default, which is always sent. None: the field is not sent unless it is set."""
        ...

    def problem(self, value: Any) -> str | None:
        """Describe why a value of the right type is not allowed, or return None."""
        ...


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    values: tuple[str, ...]
    default: str | None = None

    def problem(self, value: Any) -> str | None:
        """Describe a word that is not among the values."""
        return None if value in self.values else f"must be one of {', '.join(self.values)}"


@dataclass(frozen=True)
class Number:
    """A number within bounds, both included."""

    minimum: float | None = None
    maximum: float | None = None
    default: float | None = None
    whole: bool = False

    def problem(self, value: Any) -> str | None:
        """Describe a number out of bounds."""
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum:g}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum:g}"
        return None


@dataclass(frozen=True)
class Flag:
    """True or false."""

    default: bool

    def problem(self, value: Any) -> str | None:  # noqa: ARG002 - both values are allowed
        """Return None."""
        return None


@dataclass(frozen=True)
class Size:
    """A preset's name, or a width and a height in pixels.

    Attributes:
        minimum: The smallest width and height.
        maximum: The largest width and height.
        step: Both are multiples of it.
        presets: The names.
    """

    minimum: int
    maximum: int
    default: str = "landscape_4_3"
    step: int = 32
    presets: tuple[str, ...] = (
        "square_hd",
        "square",
        "portrait_4_3",
        "portrait_16_9",
        "landscape_4_3",
        "landscape_16_9",
    )

    def problem(self, value: Any) -> str | None:
        """Describe a size out of bounds, or one that is no multiple of `step`."""
        if isinstance(value, str):
            return None if value in self.presets else f"must be width x height or one of {', '.join(self.presets)}"
        for name, pixels in (("width", value.width), ("height", value.height)):
            if not self.minimum <= pixels <= self.maximum:
                return f"{name} must be {self.minimum} to {self.maximum} pixels"
            if pixels % self.step:
                return f"{name} must be a multiple of {self.step}: {pixels - pixels % self.step} is the next smaller"
        return None


@dataclass(frozen=True)
class Loras:
    """A list of LoRA weights, each with a path and perhaps a scale."""

    most: int
    scale: Number
    default: None = None

    def problem(self, value: Any) -> str | None:
        """Describe a list that is too long, or a scale out of bounds."""
        if len(value) > self.most:
            return f"must be at most {self.most}"
        problems = (self.scale.problem(lora.scale) for lora in value if lora.scale is not None)
        return next((f"scale {problem}" for problem in problems if problem is not None), None)


@dataclass(frozen=True)
class References:
    """The reference images of an edit model.

    Attributes:
        parameter: The service's name of the field.
        most: How many it takes. One is needed at least.
        listed: Whether the field is a list. Otherwise it is one address, or, where `most` allows it, either.
    """

    parameter: Literal["image_url", "image_urls"]
    most: int
    listed: bool


@dataclass(frozen=True)
class Model:
    """One model of the service.

    Attributes:
        id: Its name in requests.
        fields: The fields that it takes beside `model`, `prompt` and its reference images.
        references: Its reference images; None for a model that takes none.
    """

    id: FluxModel
    fields: Mapping[str, FieldSpec] = field(hash=False)
    references: References | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults that are always sent, so that a change of the service's defaults changes no image."""
        return {name: spec.default for name, spec in self.fields.items() if spec.default is not None}


_SEED = Number(minimum=1, whole=True)
_COUNT = Number(minimum=1, maximum=4, default=1)
_GUIDANCE = Number(minimum=1, maximum=20)
_FROM_ZERO = Number(minimum=0, maximum=20)
_TOLERANCE = Choice(("1", "2", "3", "4", "5", "6"), "2")
_RATIO = Choice(("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21"), "16:9")
_JPEG_OR_PNG = Choice(("jpeg", "png"), "jpeg")
_ANY_FORMAT = Choice(("jpeg", "png", "webp"), "png")
_ACCELERATION = Choice(("none", "regular", "high"), "regular")
_CHECKED = Flag(default=True)
_EXPANDED = Flag(default=True)
_STEPS = Number(minimum=1, maximum=50, default=50, whole=True)
_LORAS = Loras(most=3, scale=Number(minimum=0, maximum=4))

_KONTEXT: dict[str, FieldSpec] = {
    "num_images": _COUNT,
    "seed": _SEED,
    "guidance_scale": _GUIDANCE,
    "safety_tolerance": _TOLERANCE,
    "output_format": _JPEG_OR_PNG,
    "aspect_ratio": _RATIO,
}
_DEV: dict[str, FieldSpec] = {
    "num_images": _COUNT,
    "seed": _SEED,
    "guidance_scale": _GUIDANCE,
    "num_inference_steps": _STEPS,
    "enable_safety_checker": _CHECKED,
}
_SRPO: dict[str, FieldSpec] = {
    "num_images": _COUNT,
    "seed": _SEED,
    "guidance_scale": Number(minimum=1, maximum=20, default=4.5),
    "enable_safety_checker": _CHECKED,
    "output_format": _JPEG_OR_PNG,
    "acceleration": _ACCELERATION,
}
_FLUX_2: dict[str, FieldSpec] = {
    "image_size": Size(512, 2048),
    "output_format": _ANY_FORMAT,
    "enable_prompt_expansion": _EXPANDED,
    "num_images": _COUNT,
    "seed": _SEED,
    "guidance_scale": _FROM_ZERO,
    "num_inference_steps": Number(minimum=4, maximum=50, whole=True),
    "acceleration": _ACCELERATION,
    "enable_safety_checker": _CHECKED,
}
_FLUX_2_PRO: dict[str, FieldSpec] = {
    "image_size": Size(512, 2048),
    "output_format": _ANY_FORMAT,
    "seed": _SEED,
    "enable_safety_checker": _CHECKED,
    "safety_tolerance": _TOLERANCE,
}
_UP_TO_THREE = References("image_urls", most=3, listed=True)
_UP_TO_FOUR = References("image_url", most=4, listed=False)
_ONE = References("image_url", most=1, listed=False)

_ENTRIES = (
    Model("flux/kontext-max/text-to-image", _KONTEXT),
    Model("flux/kontext-pro/text-to-image", _KONTEXT),
    Model(
        "flux-pro",
        {
            "num_images": _COUNT,
            "seed": _SEED,
            "image_size": Size(256, 1440),
            "num_inference_steps": _STEPS,
            "guidance_scale": _GUIDANCE,
            "safety_tolerance": _TOLERANCE,
            "output_format": _JPEG_OR_PNG,
        },
    ),
    Model(
        "flux-pro/v1.1",
        {
            "num_images": _COUNT,
            "seed": _SEED,
            "image_size": Size(256, 1440),
            "safety_tolerance": _TOLERANCE,
            "output_format": _JPEG_OR_PNG,
            "enable_safety_checker": _CHECKED,
        },
    ),
    Model(
        "flux-pro/v1.1-ultra",
        {
            "num_images": _COUNT,
            "seed": _SEED,
            "safety_tolerance": _TOLERANCE,
            "output_format": _JPEG_OR_PNG,
            "enable_safety_checker": _CHECKED,
            "aspect_ratio": _RATIO,
        },
    ),
    Model("flux-realism", _DEV | {"image_size": Size(512, 1536), "output_format": _JPEG_OR_PNG}),
    Model("flux/dev", _DEV | {"image_size": Size(512, 1536)}),
    Model(
        "flux/schnell",
        {
            "num_images": _COUNT,
            "seed": _SEED,
            "image_size": Size(64, 1536),
            "num_inference_steps": Number(minimum=1, whole=True),
            "enable_safety_checker": _CHECKED,
        },
    ),
    Model(
        "flux/srpo",
        _SRPO
        | {
            "image_size": Size(512, 1536),
            "num_inference_steps": Number(minimum=1, maximum=50, default=28, whole=True),
        },
    ),
    Model("blackforestlabs/flux-2", _FLUX_2),
    Model("blackforestlabs/flux-2-pro", _FLUX_2_PRO),
    Model(
        "blackforestlabs/flux-2-max",
        _FLUX_2_PRO | {"output_format": _JPEG_OR_PNG, "safety_tolerance": Choice(("1", "2", "3", "4", "5"), "2")},
    ),
    Model("blackforestlabs/flux-2-lora", _FLUX_2 | {"loras": _LORAS}),
    Model("flux/kontext-max/image-to-image", _KONTEXT, _UP_TO_FOUR),
    Model("flux/kontext-pro/image-to-image", _KONTEXT, _UP_TO_FOUR),
    Model("flux/dev/image-to-image", _DEV | {"strength": Number(default=0.95)}, _ONE),
    Model(
        "flux/srpo/image-to-image",
        _SRPO
        | {
            "num_inference_steps": Number(minimum=1, maximum=50, default=40, whole=True),
            "strength": Number(minimum=0, maximum=1, default=0.95),
        },
        _ONE,
    ),
    Model("blackforestlabs/flux-2-edit", _FLUX_2, _UP_TO_THREE),
    Model("blackforestlabs/flux-2-pro-edit", _FLUX_2_PRO, _UP_TO_THREE),
    Model("blackforestlabs/flux-2-lora-edit", _FLUX_2 | {"loras": _LORAS}, _UP_TO_THREE),
)

MODELS: Mapping[str, Model] = {model.id: model for model in _ENTRIES}
"""All models, by id."""


def models_that_take(name: str) -> list[str]:
    """List the ids of the models that take a field."""
    return [model.id for model in _ENTRIES if name in model.fields]
