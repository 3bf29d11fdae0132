"""What is to be forecast, and what a forecast says."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from flux_prefect.forecast.latency import Latency, Seconds
from flux_prefect.pipeline import Density

__all__ = ["Forecast", "Scenario"]

_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1)]


class Scenario(BaseModel):
    """A batch and what it runs on. Shares are of paid calls, 0 to 1; times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(ge=0, description="Images to make, one a row, none of them there yet.")
    workers: _Count = Field(default=1, description="Runs at a time, each a process of its own.")
    max_in_flight: _Count = Field(default=8, description="Paid calls at once of each run.")
    max_in_flight_in_all: _Count | None = Field(
        default=None, description="Paid calls at once of all runs together. Empty: as many as each may have."
    )
    shard_size: _Count | None = Field(
        default=None, description="Rows of a run. Empty: as many runs as workers, all of one size."
    )
    density: Density = Field(default="chunks", description="How a run carries its rows.")

    latency: Latency = Field(description="How long the service takes for a call.")
    service_in_flight: _Count | None = Field(
        default=None, description="Calls that the service takes at once; one more is answered with 429. Empty: all."
    )
    refused: _Share = Field(
        default=0, description="Calls that are answered at once with 429, whatever is in flight. Not billed."
    )
    retry_after: Seconds | None = Field(default=None, description="The pause that a 429 asks for. Empty: none.")
    failed: _Share = Field(default=0, description="Calls that end with a 5xx, not billed.")
    failed_after: Seconds | None = Field(
        default=None, description="How long such a call takes. Empty: as long as a good one."
    )
    lost: _Share = Field(default=0, description="Calls that are billed and whose answers are lost.")
    flagged: _Share = Field(default=0, description="Calls that are billed and whose images are not published.")

    retries: int = Field(default=4, ge=0, description="FLUX_PREFECT_RETRIES.")
    retry_delays: tuple[Seconds, ...] = Field(
        default=(2, 8, 30, 60), min_length=1, description="FLUX_PREFECT_RETRY_DELAY_SECONDS."
    )
    repeat_unknown: int = Field(default=1, ge=0, description="FLUX_PREFECT_REPEAT_UNKNOWN.")

    cpu_seconds: Seconds = Field(default=0, description="CPU time of a run for an image.")
    cores: _Count | None = Field(
        default=None, description="Cores that all runs share. Empty: each run has one of its own, which is its most."
    )
    transfer_seconds: Seconds = Field(default=0, description="An image's download and upload, beside their CPU time.")
    start_seconds: Seconds = Field(default=0, description="Of each run, before its rows: the process, the plan.")
    end_seconds: Seconds = Field(default=0, description="Of each run, after its rows: the manifest, the gallery.")
    before_seconds: Seconds = Field(default=0, description="Once, before the first run: the plan of all of them.")
    after_seconds: Seconds = Field(default=0, description="Once, after the last run: their reports are merged.")

    price: float = Field(default=200_000, ge=0, allow_inf_nan=False, description="Credits of an image.")
    keys: int = Field(default=0, ge=0, description="Keys below the bucket's prefix before: two an image.")
    lease_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="The bucket's setting of that name."
    )
    results_in_bucket: bool = Field(default=False, description="Prefect's results are kept in the bucket too.")

    random_seed: int = Field(default=0, description="What all draws come from.")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.refused == 1:
            raise ValueError("refused is 1: a batch whose every call is refused never ends")
        if self.refused + self.failed + self.lost + self.flagged > 1:
            raise ValueError("refused, failed, lost and flagged are shares of the same calls: they are over 1 together")
        return self

    def shards(self) -> list[int]:
        """How many rows each run has."""
        size = self.shard_size or max(1, math.ceil(self.images / self.workers))
        return [min(size, self.images - first) for first in range(0, self.images, size)]


class Forecast(BaseModel):
    """What comes of a scenario."""

    model_config = ConfigDict(frozen=True)

    seconds: float = Field(description="From the beginning to the end of all.")
    published: int = Field(description="Images published.")
    flagged: int = Field(description="Images paid for and not published.")
    failed: int = Field(description="Rows without an image, their retries used up.")
    calls: int = Field(description="Paid calls sent, whatever their answers.")
    billed_calls: int = Field(description="Calls that cost money.")
    refused_calls: int = Field(description="Calls answered with 429.")
    credits: float = Field(description="What it costs, in credits.")
    s3_requests: dict[str, int] = Field(description="Requests to the bucket, by operation.")
    mean_in_flight: float = Field(description="Calls at the service at once, on average over the whole time.")
    busiest_cpu: float = Field(description="Share of the whole time in which the busiest worker computes, 0 to 1.")
