"""The settings of the sandbox, readable and changeable while it runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from flux_prefect.api.models import CREDITS_PER_USD
from flux_prefect.api.registry import FluxModel

__all__ = ["START_BALANCE", "Deprecated", "Envelope", "ResponseShape", "SandboxSettings", "ServiceSettings"]

START_BALANCE = 10_000 * CREDITS_PER_USD
"""Credits of a new sandbox's account: ten thousand US dollars, so that no batch runs dry unasked."""

PRICES: dict[FluxModel, int] = {
    "flux/kontext-pro/text-to-image": 84_000,
    "flux/kontext-pro/image-to-image": 84_000,
    "flux-pro": 105_000,
    "flux-pro/v1.1": 84_000,
    "flux-pro/v1.1-ultra": 126_000,
    "flux-realism": 73_500,
    "flux/dev": 52_500,
    "flux/dev/image-to-image": 52_500,
    "flux/schnell": 6_300,
    "flux/srpo": 52_500,
    "flux/srpo/image-to-image": 52_500,
    "blackforestlabs/flux-2": 25_200,
    "blackforestlabs/flux-2-edit": 25_200,
    "blackforestlabs/flux-2-lora": 44_100,
    "blackforestlabs/flux-2-lora-edit": 44_100,
    "blackforestlabs/flux-2-pro": 63_000,
    "blackforestlabs/flux-2-pro-edit": 63_000,
    "blackforestlabs/flux-2-max": 147_000,
}
"""Credits an image. Stand-ins: the service's documents state no prices. Kontext max costs `price`."""

ResponseShape = Literal["images", "data", "b64", "data_uri", "both"]
Envelope = Literal["mixed", "problem", "plain"]


class Deprecated(BaseModel):
    """A model on the list of deprecations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: FluxModel = Field(description="The model.")
    status: Literal["deprecated", "superseded", "withdrawn"] = Field(description="Of a withdrawn one, calls are 404.")
    replaced_by: FluxModel | None = Field(default=None, description="The model that takes its place.")


class ServiceSettings(BaseModel):
    """Everything that can be set, apart from the balance. Unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    latency: float = Field(default=0.5, ge=0, description="Seconds that a generation takes.")
    latency_jitter: float = Field(
        default=0, ge=0, description="At most this many seconds more, drawn anew for each generation."
    )
    price: int = Field(
        default=168_000,
        ge=0,
        description="Credits an image of a model that has none among `prices`. 2,000,000 are one US dollar.",
    )
    prices: dict[FluxModel, Annotated[int, Field(ge=0)]] = Field(
        default=PRICES, description="Credits an image, by model."
    )
    deprecations: list[Deprecated] = Field(default=[], description="What /v1/models/deprecations lists.")
    url_ttl: float = Field(default=600, ge=0, description="Seconds that a result URL lives.")
    max_in_flight: int | None = Field(
        default=None, ge=1, description="Generations at once; over it the answer is 429. Empty: no limit."
    )
    rate_limit_per_minute: int | None = Field(
        default=None, ge=1, description="Generations a minute; over it the answer is 429. Empty: no limit."
    )
    retry_after: float | None = Field(
        default=None,
        ge=0,
        description="Retry-After, in seconds, on the 429s of the two limits above. Empty: the header is not sent.",
    )
    response_shape: ResponseShape = Field(
        default="images",
        description=(
            "images: as in the service's samples. data: as in its schema. b64: the same with inline "
            "images. data_uri: as images, with data: URIs. both: images and data."
        ),
    )
    envelope: Envelope = Field(
        default="mixed",
        description="Errors as problem+json, as the plain envelope, or mixed: plain for 401, 404, 405 and 429.",
    )
    fast: bool = Field(default=False, description="Send prebuilt images, unique but not drawn: for benchmarks.")
    fast_bytes: int = Field(
        default=300_000, ge=1_000, le=100_000_000, description="How large a fast image is made, in bytes."
    )

    def price_of(self, model: FluxModel) -> int:
        """Credits an image of a model."""
        return self.prices.get(model, self.price)


class SandboxSettings(ServiceSettings):
    """The settings and the account's balance, as `/sandbox/settings` shows them."""

    balance: int = Field(default=START_BALANCE, ge=0, description="Credits left.")
