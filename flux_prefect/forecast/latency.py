"""Latency of calls: constant, lognormal or measured."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from typing_extensions import Self

__all__ = [
    "ConstantLatency",
    "Latency",
    "LatencyError",
    "LognormalLatency",
    "MeasuredLatency",
    "Seconds",
    "parse_latency",
]

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_NORMAL = NormalDist()
_P95 = _NORMAL.inv_cdf(0.95)
_LEAST_RANK = 1e-12  # the quantile of 0 is minus infinity


class LatencyError(ValueError):
    """The text is not a latency; the message lists the accepted forms."""


class ConstantLatency(BaseModel):
    """Every call takes the same time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constant"] = "constant"
    seconds: Seconds = Field(description="Seconds of each call.")

    def at(self, rank: float) -> float:  # noqa: ARG002 - the same interface as the others
        """Return the seconds of the call at a rank, 0 to 1, among all calls by duration."""
        return self.seconds


class LognormalLatency(BaseModel):
    """Most calls take about the same time and some much longer, which is typical of services."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lognormal"] = "lognormal"
    median: float = Field(gt=0, allow_inf_nan=False, description="Seconds that half of the calls stay under.")
    p95: float = Field(gt=0, allow_inf_nan=False, description="Seconds that 95 calls of 100 stay under.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.p95 < self.median:
            raise ValueError("p95 is less than the median")
        return self

    def at(self, rank: float) -> float:
        """Return the seconds of the call at a rank, 0 to 1, among all calls by duration."""
        deviations = _NORMAL.inv_cdf(min(max(rank, _LEAST_RANK), 1 - _LEAST_RANK)) / _P95
        return self.median * math.exp(deviations * math.log(self.p95 / self.median))


class MeasuredLatency(BaseModel):
    """Calls take as long as measured calls did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["measured"] = "measured"
    seconds: tuple[Seconds, ...] = Field(min_length=1, description="Seconds of each measured call, in any order.")

    @field_validator("seconds")
    @classmethod
    def _sorted(cls, seconds: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(seconds))

    def at(self, rank: float) -> float:
        """Return the seconds of the call at a rank, 0 to 1, among all calls by duration."""
        return self.seconds[min(int(rank * len(self.seconds)), len(self.seconds) - 1)]


Latency = Annotated[ConstantLatency | LognormalLatency | MeasuredLatency, Field(discriminator="kind")]

_LATENCY: TypeAdapter[ConstantLatency | LognormalLatency | MeasuredLatency] = TypeAdapter(Latency)


def parse_latency(text: str) -> ConstantLatency | LognormalLatency | MeasuredLatency:
    """Parse `8` (seconds), `6:20` (median and 95th percentile), or a file with the seconds of a call on each line.

    Raises:
        LatencyError: the text is none of these.
    """
    try:
        if Path(text).is_file():
            return _LATENCY.validate_python({"kind": "measured", "seconds": Path(text).read_text("utf-8").split()})
        median, colon, p95 = text.partition(":")
        if colon:
            return _LATENCY.validate_python({"kind": "lognormal", "median": median, "p95": p95})
        return _LATENCY.validate_python({"kind": "constant", "seconds": text})
    except (ValidationError, UnicodeDecodeError) as error:
        raise LatencyError(
            f"latency {text!r} must be a number of seconds (8), a median and 95th percentile (6:20), or a file with a "
            "number of seconds on each line"
        ) from error
