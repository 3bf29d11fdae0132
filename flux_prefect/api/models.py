"""Requests to the image service and its responses."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from flux_prefect.api.registry import MODELS, EditModel, Model, TextToImageModel, models_that_take
from flux_prefect.errors import Billed, EmptyGeneration, InvalidResponse

__all__ = [
    "CREDITS_PER_USD",
    "FILE_EXTENSIONS",
    "GENERATIONS_PATH",
    "MAX_SEED",
    "Acceleration",
    "AspectRatio",
    "Balance",
    "GeneratedImage",
    "Generation",
    "GuidanceScale",
    "ImageCount",
    "ImageRequest",
    "ImageSettings",
    "ImageSize",
    "LogEntry",
    "Lora",
    "OutputFormat",
    "SafetyTolerance",
    "Seed",
    "SizePreset",
    "normalize_endpoint",
    "parse_generation",
    "parse_log",
]

GENERATIONS_PATH = "/v1/images/generations"

CREDITS_PER_USD = 2_000_000
"""The service's credits for one US dollar."""

MAX_SEED = 2**32 - 1
"""The largest seed sent. The service documents no limit; its samples fit an unsigned 32-bit number."""

SafetyTolerance = Literal["1", "2", "3", "4", "5", "6"]
OutputFormat = Literal["jpeg", "png", "webp"]

FILE_EXTENSIONS: dict[OutputFormat, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""File name extensions, by format."""

SizePreset = Literal["square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"]
Acceleration = Literal["none", "regular", "high"]
AspectRatio = Literal["21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21"]

ModelChoice = (
    Annotated[TextToImageModel, Field(title="From a prompt")]
    | Annotated[EditModel, Field(title="Edit")]
    | Annotated[str, Field(title="Other id", max_length=200)]
)
"""A model of the registry, or any other of the endpoint. The titles are the tabs of Prefect's forms."""

Seed = Annotated[int, Field(ge=1, le=MAX_SEED)]
GuidanceScale = Annotated[
    float | None,
    Field(
        ge=0,
        le=20,
        allow_inf_nan=False,
        description="How closely the image follows the prompt, 1 to 20 (FLUX.2: 0 to 20). Not sent if empty.",
    ),
]
ImageCount = Annotated[int, Field(ge=1, le=4, description="Images per request, 1 to 4. Each is paid for.")]

_SIZE = re.compile("\\s*(\\d{1,6})\\s*[x*\u00d7]\\s*(\\d{1,6})\\s*", re.IGNORECASE)  # 1024x768
_SUCCEEDED = {"succeeded": True, "success": True, "failed": False, "error": False}
_TIME = TypeAdapter(datetime)


def _is_none(value: Any) -> bool:
    return value is None


class ImageSize(BaseModel):
    """The width and height of an image, in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(ge=1, description="Pixels.")
    height: int = Field(ge=1, description="Pixels.")

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Lora(BaseModel):
    """One LoRA: extra weights of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1, description="The address of the weights, or their repository as owner/name.")
    scale: float | None = Field(default=None, allow_inf_nan=False, description="How strongly they apply, 0 to 4.")


class ImageSettings(BaseModel):
    """The fields of a request beside its prompt and its seed. A field left empty has its model's default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aspect_ratio: AspectRatio | None = Field(
        default=None, description="Width to height; the service chooses the size in pixels. Kontext and ultra: 16:9."
    )
    output_format: OutputFormat | None = Field(
        default=None, description="The image's file format. Empty: jpeg, or png for most FLUX.2 models."
    )
    guidance_scale: GuidanceScale = None
    safety_tolerance: SafetyTolerance | None = Field(
        default=None, description="1 is the strictest, 5 and 6 are the most permissive. Empty: 2."
    )
    num_images: ImageCount = 1
    model: ModelChoice = Field(
        default="flux/kontext-max/text-to-image",
        description="The model of the service. An id that is not listed needs extra_fields.",
    )
    image_size: ImageSize | SizePreset | None = Field(
        default=None,
        exclude_if=_is_none,
        description="A preset, or width and height in multiples of 32. Empty: landscape_4_3.",
    )
    num_inference_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, exclude_if=_is_none, description="Steps of the model, up to 50 for most. Empty: its default."
    )
    acceleration: Acceleration | None = Field(
        default=None, exclude_if=_is_none, description="How much speed is preferred. Empty: regular."
    )
    enable_prompt_expansion: bool | None = Field(
        default=None, exclude_if=_is_none, description="Whether the service adds detail to the prompt. Empty: yes."
    )
    enable_safety_checker: bool | None = Field(
        default=None, exclude_if=_is_none, description="Whether the service checks the image's safety. Empty: yes."
    )
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        default=None,
        exclude_if=_is_none,
        description="How much the prompt influences an edited image, 0 to 1. Empty: 0.95.",
    )
    loras: tuple[Lora, ...] | None = Field(
        default=None, exclude_if=_is_none, description="Up to three LoRAs, each with a path and a scale."
    )
    extra_fields: dict[str, JsonValue] | None = Field(
        default=None,
        exclude_if=_is_none,
        description=(
            "Fields sent as they are, for a model of the endpoint that is not listed. May be empty ({}). Nothing is "
            "checked; identity and custody are as for all models."
        ),
    )

    @field_validator("image_size", mode="before")
    @classmethod
    def _parse_size(cls, value: Any) -> Any:
        parts = _SIZE.fullmatch(value) if isinstance(value, str) else None
        return value if parts is None else {"width": int(parts[1]), "height": int(parts[2])}

    @field_validator("loras", "extra_fields", mode="before")
    @classmethod
    def _parse_json(cls, value: Any) -> Any:
        """Read a table's cell that holds a list or an object."""
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
            try:
                return json.loads(value)
            except ValueError as error:
                raise ValueError(f"is not valid JSON ({error})") from error
        return value


class _PromptAndSeed(BaseModel):
    prompt: str = Field(
        min_length=1,
        max_length=4000,
        description="What the image shows: content, style, composition. 1 to 4,000 characters.",
    )
    seed: Seed | None = Field(
        default=None,
        description=(
            "The same seed with the same other fields makes the same image. "
            "A flow draws and records one if it is empty."
        ),
    )


class ImageRequest(ImageSettings, _PromptAndSeed):
    """One request to the service, validated before it costs anything.

    Each model has its own fields, bounds and defaults (`flux_prefect.api.registry`). A field that the model does not
    take is refused. The service's defaults are filled in and always sent, so that a change of its defaults never
    changes an image.

    Example:
        ```python
        ImageRequest(prompt="a lighthouse at dusk", seed=7, aspect_ratio="1:1")
        ImageRequest(prompt="a lighthouse at dusk", seed=7, model="flux/dev", image_size="1024x768")
        ```
    """

    @field_validator("seed", "guidance_scale", "num_images", "num_inference_steps", "strength", mode="before")
    @classmethod
    def _reject_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a number, not a boolean")  # noqa: TRY004 - pydantic gathers ValueErrors
        return value

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("prompt is blank: describe what the image shows")
        return prompt

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        model = MODELS.get(given.get("model", cls.model_fields["model"].default))
        defaults = {} if model is None else model.defaults
        return {**given, **{name: value for name, value in defaults.items() if given.get(name) is None}}

    @model_validator(mode="after")
    def _check_against_model(self) -> ImageRequest:
        model = MODELS.get(self.model)
        problems = self._of_an_unknown_model() if model is None else self._of_fields(model)
        if problems:
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError("model_field", "{problem}", {"problem": problem}),
                        loc=(name,),
                        input=getattr(self, name),
                    )
                    for name, problem in problems.items()
                ],
            )
        return self

    def _of_an_unknown_model(self) -> dict[str, str]:
        if self.extra_fields is None:
            near = difflib.get_close_matches(self.model, MODELS, n=3, cutoff=0.5)
            known = f"did you mean {' or '.join(near)}?" if near else "flux_prefect.MODELS lists them."
            return {"model": f"is not a known model: {known} To send it all the same, set extra_fields (or {{}})"}
        clash = sorted(set(self.extra_fields) & set(type(self).model_fields))
        return {"extra_fields": f"must not hold {', '.join(clash)}: set the request's own field"} if clash else {}

    def _of_fields(self, model: Model) -> dict[str, str]:
        problems = {}
        for name in ImageSettings.model_fields:
            value = getattr(self, name)
            if name == "model" or value is None or (name == "num_images" and value == 1):
                continue
            spec = model.fields.get(name)
            if spec is None:
                problems[name] = _not_taken(name, model)
            elif problem := spec.problem(value):
                problems[name] = f"{problem} for {model.id}"
        return problems

    def __hash__(self) -> int:
        return hash((self.model, self.prompt, self.seed))  # other fields may hold lists and objects

    @property
    def label(self) -> str:
        """A short line for run names and logs: the start of the prompt, and the seed."""
        words = " ".join(self.prompt.split())
        what = words if len(words) <= 48 else words[:47].rstrip() + "…"  # noqa: PLR2004 - a line's worth
        return f"{what} · seed {self.seed}" if self.seed is not None else what

    @property
    def shape(self) -> str:
        """The requested shape in a word: the aspect ratio, the size as 1024x768, the preset, or `default`."""
        return str(self.aspect_ratio or self.image_size or "default")

    @property
    def extension(self) -> str:
        """The file name extension of its images; `img` for a model whose format can't be chosen."""
        return "img" if self.output_format is None else FILE_EXTENSIONS[self.output_format]

    def payload(self) -> dict[str, Any]:
        """Build the JSON body for the service, with every default and without fields that are None."""
        body = self.model_dump(mode="json", exclude_none=True, exclude={"extra_fields"})
        model = MODELS.get(self.model)
        if self.num_images == 1 if model is None else "num_images" not in model.fields:
            del body["num_images"]
        return {**body, **(self.extra_fields or {})}

    def fingerprint(self, endpoint: str) -> str:
        """Compute the identity of this request's images at one endpoint: 32 hex digits.

        Two requests share a fingerprint exactly if the service promises the same images. It covers all fields that
        change the image and the endpoint's root URL, never the API key.

        Raises:
            ValueError: the request has no seed, so its images can't be identified.

        Example:
            ```python
            ImageRequest(prompt="a lighthouse at dusk", seed=7).fingerprint("https://api.aimlapi.com")
            ```
        """
        if self.seed is None:
            raise ValueError("seed is missing: only a request with a seed has a fingerprint")
        return _fingerprint(self, endpoint)


def _not_taken(name: str, model: Model) -> str:
    takers = models_that_take(name)
    taken = f"; {', '.join(takers)} {'takes' if len(takers) == 1 else 'take'} it" if takers else ""
    return f"is not a field of {model.id}{taken}"


class GeneratedImage(BaseModel):
    """One image of a response: its URL, and what the service reported about it."""

    model_config = ConfigDict(frozen=True)

    index: int = Field(ge=0, description="The image's position in the response, from 0.")
    url: str | None = Field(
        description=(
            "The URL of the bytes, valid for some minutes. None once inline bytes are in the spool, or the image is in "
            "the bucket."
        )
    )
    width: int | None = Field(default=None, description="Pixels, as reported by the service.")
    height: int | None = Field(default=None, description="Pixels, as reported by the service.")
    content_type: str | None = Field(default=None, description="The MIME type, as reported by the service.")
    flagged: bool = Field(default=False, description="Whether the service flagged the image as unsafe.")


class Generation(BaseModel):
    """One paid response of the service. A small record: it has no image bytes once a task returns it."""

    model_config = ConfigDict(frozen=True)

    request: ImageRequest = Field(
        description="The request as it was sent, with the seed that the service reported if it had none."
    )
    endpoint: str = Field(description="The root URL of the service.")
    fingerprint: str = Field(
        description=(
            "The identity of these images. For a request without a seed: by the seed that the service "
            "reported, else by the call itself."
        )
    )
    images: tuple[GeneratedImage, ...] = Field(description="The images, in the service's order.")
    replaces: str | None = Field(
        default=None,
        description="The call whose answer this one replaces, until an image of it was fetched: its URL had died.",
    )
    shared_as: str | None = Field(
        default=None,
        description="The object in a bucket by which other hosts find this answer, until its images are published.",
    )
    seed: int | None = Field(description="The requested seed, else the one that the service reported.")
    reported_seed: int | None = Field(default=None, description="The seed that the service reported.")
    credits_used: float | None = Field(
        default=None, description="Cost of the call, in credits (2,000,000 to the US dollar)."
    )
    usd_spent: float | None = Field(default=None, description="Cost of the call, in US dollars.")
    inference_id: str | None = Field(default=None, description="The service's id of the call.")
    client_request_id: str = Field(description="This package's id of the call, sent as X-Client-Request-Id.")
    created_at: datetime = Field(description="When the response was complete, UTC.")


class Balance(BaseModel):
    """The balance of an account."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    credits: float = Field(description="Credits, 2,000,000 to the US dollar.")
    usd: float = Field(description="US dollars.")


class LogEntry(BaseModel):
    """One row of the service's log: one request that reached it. Missing values are None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client_request_id: str | None = Field(default=None, description="This package's id of the call, if any.")
    inference_id: str | None = Field(default=None, description="The service's id of the call.")
    status: str | None = Field(default=None, description="The outcome, in the service's own word.")
    succeeded: bool | None = Field(default=None, description="Whether `status` means success. None if unknown.")
    credits: float | None = Field(default=None, description="Cost, in credits (2,000,000 to the US dollar).")
    created_at: datetime | None = Field(default=None, description="Time of the request by the service's clock, UTC.")

    @property
    def billed(self) -> Billed:
        """Whether it was billed: a cost means yes for any status; a success that cost 0 may still be charged for."""
        if self.credits:
            return Billed.YES
        if self.succeeded is False:
            return Billed.NO
        return Billed.YES if self.succeeded and self.credits is None else Billed.UNKNOWN


@functools.lru_cache(maxsize=512)  # used by every step of an image
def _fingerprint(request: ImageRequest, endpoint: str) -> str:
    canonical = json.dumps(
        {"version": 1, "endpoint": normalize_endpoint(endpoint), "request": request.payload()},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
    )
    return _digest(canonical)


def normalize_endpoint(endpoint: str) -> str:
    """Normalize the root URL as fingerprints use it: no trailing slash, host in lower case."""
    scheme, separator, rest = endpoint.strip().partition("://")
    if not separator:
        raise ValueError(f"base_url {endpoint!r} has no scheme: write it as https://api.aimlapi.com")
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}://{host.lower()}{slash}{path}".rstrip("/")


def parse_generation(  # noqa: PLR0913 - two parts of an answer, and by keyword what was asked
    body: Any,
    headers: Mapping[str, str],
    *,
    request: ImageRequest,
    endpoint: str,
    client_request_id: str,
    created_at: datetime,
) -> Generation:
    """Parse any of the response formats that the service is known to send.

    `{"data": [{"url" | "b64_json"}], "meta"}` as in its schema, `{"images": [{"url", ...}], "seed",
    "has_nsfw_concepts"}` as in its samples, or both at once. Inline images become `data:` URIs in
    `GeneratedImage.url`.

    Raises:
        InvalidResponse: the body is not a JSON object, or its lists contain something other than images.
        EmptyGeneration: the body has no image.
    """
    cost = _read_cost(body, headers)
    if not isinstance(body, dict):
        raise InvalidResponse(
            f"The service answered with {_kind(body)} instead of a JSON object. "
            f"{_paid_sentence(cost)} Look for {client_request_id} in its log.",
            client_request_id=client_request_id,
            billed=_billed(cost),
            credits_used=cost.credits_used,
        )
    listed, data = (_read_list(body, name, client_request_id, cost) for name in ("images", "data"))
    flags = body.get("has_nsfw_concepts")
    images: list[GeneratedImage] = []
    for index in range(max(len(listed), len(data))):
        item = {**_item(data, index), **_item(listed, index)}
        url = _read_url(item, request.output_format)
        if url is None:
            continue
        images.append(
            GeneratedImage(
                index=index,
                url=url,
                width=_read_int(item.get("width")),
                height=_read_int(item.get("height")),
                content_type=_read_text(item.get("content_type")),
                flagged=isinstance(flags, Sequence) and index < len(flags) and flags[index] is True,
            )
        )
    if not images:
        raise EmptyGeneration(
            f"The service answered with no image in it. {_paid_sentence(cost)} "
            f"Look for {client_request_id} in its log.",
            client_request_id=client_request_id,
            billed=_billed(cost),
            credits_used=cost.credits_used,
        )
    reported_seed = _read_int(body.get("seed"))
    seed = request.seed if request.seed is not None else reported_seed
    if seed is not None and 1 <= seed <= MAX_SEED:
        request = request.model_copy(update={"seed": seed})
        fingerprint = request.fingerprint(endpoint)
    else:
        fingerprint = _digest(f"call {client_request_id}")
    return Generation(
        request=request,
        endpoint=normalize_endpoint(endpoint),
        fingerprint=fingerprint,
        images=tuple(images),
        seed=seed,
        reported_seed=reported_seed,
        credits_used=cost.credits_used,
        usd_spent=cost.usd_spent,
        inference_id=headers.get("x-inference-id"),
        client_request_id=client_request_id,
        created_at=created_at,
    )


def parse_log(body: Any) -> list[LogEntry]:
    """Parse one page of the log, in the service's order, one entry per row. Missing or invalid fields are None.

    Raises:
        InvalidResponse: the body has no list of rows.
    """
    return [
        LogEntry(
            client_request_id=_read_text(row.get("client_request_id")),
            inference_id=_read_text(row.get("inference_id")),
            status=(status := _read_text(row.get("status"))),
            succeeded=_SUCCEEDED.get((status or "").lower()),
            credits=_read_log_cost(row.get("cost")),
            created_at=_read_time(row.get("created", row.get("created_at"))),
        )
        for row in _read_rows(body)
    ]


def _read_rows(body: Any) -> list[dict[str, Any]]:
    # The service documents {"data": [...], "pagination": {...}}. The endpoint is new, and the format of the balance
    # has changed before, so a list under another likely name, or a bare list, is accepted too.
    lists = [body.get(name) for name in ("data", "logs", "items")] if isinstance(body, dict) else [body]
    rows = next((value for value in lists if isinstance(value, list)), None)
    if rows is None or not all(isinstance(row, dict) for row in rows):
        raise InvalidResponse(
            f"The service's log is {_kind(body)} without a list of requests in data.", billed=Billed.NO
        )
    return rows


def _read_log_cost(cost: Any) -> float | None:
    if not isinstance(cost, dict):
        return None
    credits_used, usd = _read_number(cost.get("credits")), _read_number(cost.get("usd"))
    return usd * CREDITS_PER_USD if credits_used is None and usd is not None else credits_used


def _read_time(value: Any) -> datetime | None:
    try:
        time = _TIME.validate_python(value)
        # The service documents for its parameters: "A value without a UTC offset is read as UTC".
        return time.replace(tzinfo=timezone.utc) if time.tzinfo is None else time.astimezone(timezone.utc)
    except (ValidationError, OverflowError):
        return None


def _digest(text: str) -> str:
    # 128 bits: collisions are practically impossible, and object keys stay short.
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Cost(BaseModel):
    credits_used: float | None = None
    usd_spent: float | None = None


def _read_cost(body: Any, headers: Mapping[str, str]) -> _Cost:
    meta = body.get("meta") if isinstance(body, dict) else None
    usage = meta.get("usage") if isinstance(meta, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    credits_used = _largest(headers.get("x-aimlapi-credits-used"), usage.get("credits_used"))
    usd_spent = _largest(headers.get("x-aimlapi-usd-spent"), usage.get("usd_spent"))
    if not credits_used and usd_spent is not None:
        credits_used = usd_spent * CREDITS_PER_USD
    return _Cost(credits_used=credits_used, usd_spent=usd_spent)


def _billed(cost: _Cost) -> Billed:
    spent = [amount for amount in (cost.credits_used, cost.usd_spent) if amount is not None]
    if not spent:
        return Billed.UNKNOWN
    return Billed.YES if any(amount > 0 for amount in spent) else Billed.NO


def _paid_sentence(cost: _Cost) -> str:
    return {
        Billed.YES: "It was billed.",
        Billed.NO: "It was not billed.",
        Billed.UNKNOWN: "It may have been billed.",
    }[_billed(cost)]


def _read_list(body: dict[str, Any], name: str, client_request_id: str, cost: _Cost) -> list[Any]:
    value = body.get(name)
    if value is None:
        return []
    if isinstance(value, list) and all(item is None or isinstance(item, dict) for item in value):
        return value
    raise InvalidResponse(
        f"{name} in the service's answer is {_kind(value)} instead of a list of images. "
        f"{_paid_sentence(cost)} Look for {client_request_id} in its log.",
        client_request_id=client_request_id,
        billed=_billed(cost),
        credits_used=cost.credits_used,
    )


def _item(items: list[Any], index: int) -> dict[str, Any]:
    item = items[index] if index < len(items) else None
    return {key: value for key, value in (item or {}).items() if value is not None}


def _read_url(item: dict[str, Any], output_format: OutputFormat | None) -> str | None:
    url, inline = _read_text(item.get("url")), _read_text(item.get("b64_json"))
    if url is None and inline is not None:
        content_type = _read_text(item.get("content_type")) or f"image/{output_format or '*'}"
        return f"data:{content_type};base64,{inline}"
    return url


def _read_text(value: Any) -> str | None:
    if not isinstance(value, str) or not value:
        return None
    # JSON can contain lone surrogates, which neither a URL nor a record can hold.
    return value if value.encode("utf-8", errors="replace").decode("utf-8") == value else None


def _read_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _largest(*values: Any) -> float | None:
    return max((number for number in map(_read_number, values) if number is not None), default=None)


def _read_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )
