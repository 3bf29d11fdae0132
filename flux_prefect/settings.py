"""What a host sets for itself, read from the environment.

What belongs to an account or a bucket stands in the blocks instead.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Annotated

from prefect.settings import get_current_settings
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_PREFIX = "FLUX_PREFECT_"


def _default_spool() -> Path:
    return get_current_settings().home / "flux_prefect" / "spool"


def _default_locks() -> Path:
    # Not under the Prefect home: two homes on one host must still exclude each other.
    # Straight in the temporary folder, where nobody else can put another one in its place.
    return Path(tempfile.gettempdir()) / f"flux_prefect-{os.getuid()}-locks"


class FluxSettings(BaseSettings):
    """The settings, each an environment variable with the prefix `FLUX_PREFECT_`. An empty one counts as not set."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, frozen=True)

    spool: Path = Field(
        default_factory=_default_spool,
        description="Folder of the pictures and records in our custody. Default: in the Prefect home.",
    )
    locks: Path = Field(
        default_factory=_default_locks,
        description="Folder of the lock files. Must be the same for all runs of one host.",
    )
    retries: int = Field(default=4, ge=0, description="Prefect retries of a step that failed for a passing reason.")
    retry_delay_seconds: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default=[2.0, 8.0, 30.0, 60.0], min_length=1, description="Seconds before each retry; the last repeats."
    )
    credits_per_image: float = Field(
        default=200_000,
        ge=0,
        description="What a picture counts as costing, in credits, before the service charged for one. Ten US cents.",
    )
    repeat_unknown: int = Field(
        default=1,
        ge=0,
        description=(
            "How often a paid call whose answer was lost is sent again in one task run. "
            "Each repetition may pay a second time."
        ),
    )

    grace_seconds: float = Field(
        default=25,
        ge=0,
        allow_inf_nan=False,
        description=(
            "Seconds that a cancelled batch waits for its paid calls. Prefect kills a cancelled run after 30 seconds."
        ),
    )

    @field_validator("spool", "locks")
    @classmethod
    def _absolute(cls, folder: Path) -> Path:
        return folder.expanduser().absolute()


def current_settings() -> FluxSettings:
    """The settings as the environment stands now. Read anew only where it changed: reading takes milliseconds."""
    values = tuple(os.environ.get(f"{_PREFIX}{name.upper()}") for name in FluxSettings.model_fields)
    return _read(values, get_current_settings().home)


@functools.lru_cache(maxsize=8)
def _read(values: tuple[str | None, ...], home: Path) -> FluxSettings:  # noqa: ARG001 - the cache's key
    return FluxSettings()
