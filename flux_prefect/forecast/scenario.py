"""Input and result of a forecast."""

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
    """A batch and its environment. Shares are fractions of paid calls, 0 to 1; times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(ge=0, description="Images to generate, one a row, none of them published yet.")
    workers: _Count = Field(default=1, description="Runs at the same time, each in a process of its own.")
    max_in_flight: _Count = Field(default=8, description="Paid calls at once of each run.")
    max_in_flight_in_all: _Count | None = Field(
        default=None, description="Paid calls at once of all runs together. Empty: no common limit."
    )
    shard_size: _Count | None = Field(
        default=None, description="Rows of a run. Empty: as many runs as workers, all of the same size."
    )
    density: Density = Field(default="chunks", description="steps or chunks, as for publish_batch.")

    latency: Latency = Field(description="Duration of a call.")
    service_in_flight: _Count | None = Field(
        default=None, description="Calls that the service accepts at once; further ones get a 429. Empty: no limit."
    )
    refused: _Share = Field(
        default=0, description="Calls that get an immediate 429 independent of the calls in flight. Not billed."
    )
    retry_after: Seconds | None = Field(default=None, description="The pause that a 429 requests. Empty: none.")
    failed: _Share = Field(default=0, description="Calls that end with a 5xx. Not billed.")
    failed_after: Seconds | None = Field(
        default=None, description="Duration of a failed call. Empty: that of any other call."
    )
    lost: _Share = Field(default=0, description="Billed calls whose answers are lost.")
    flagged: _Share = Field(default=0, description="Billed calls whose images are flagged and not published.")

    retries: int = Field(default=4, ge=0, description="FLUX_PREFECT_RETRIES.")
    retry_delays: tuple[Seconds, ...] = Field(
        default=(2, 8, 30, 60), min_length=1, description="FLUX_PREFECT_RETRY_DELAY_SECONDS."
    )
    repeat_unknown: int = Field(default=1, ge=0, description="FLUX_PREFECT_REPEAT_UNKNOWN.")

    cpu_seconds: Seconds = Field(default=0, description="CPU time of a run for each image.")
    cores: _Count | None = Field(
        default=None,
        description="Cores that all runs share. Empty: one core for each run. A run never uses more than one.",
    )
    transfer_seconds: Seconds = Field(
        default=0, description="Duration of an image's download and upload, except their CPU time."
    )
    start_seconds: Seconds = Field(
        default=0, description="Duration of each run's start before its rows: process and plan."
    )
    end_seconds: Seconds = Field(
        default=0, description="Duration of each run's end after its rows: manifest and gallery."
    )
    before_seconds: Seconds = Field(default=0, description="Once, before the first run: planning of the whole batch.")
    after_seconds: Seconds = Field(default=0, description="Once, after the last run: merging of the reports.")

    price: float = Field(default=200_000, ge=0, allow_inf_nan=False, description="Price of an image, in credits.")
    keys: int = Field(default=0, ge=0, description="Existing keys below the bucket's prefix: two an image.")
    lease_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="The bucket's setting of that name."
    )
    results_in_bucket: bool = Field(default=False, description="Prefect's results are stored in the bucket too.")

    random_seed: int = Field(default=0, description="Seed of all random draws.")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.refused == 1:
            raise ValueError("refused must be less than 1: a batch whose calls are all refused never ends")
        if self.refused + self.failed + self.lost + self.flagged > 1:
            raise ValueError(
                "refused, failed, lost and flagged are shares of the same calls: their sum must be at most 1"
            )
        return self

    def shards(self) -> list[int]:
        """Return the number of rows of each run."""
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
