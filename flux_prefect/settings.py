"""What a host sets for itself, read from the environment.

What belongs to an account or a bucket stands in the blocks instead.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from prefect.settings import get_current_settings
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def _default_spool() -> Path:
    return get_current_settings().home / "flux_prefect" / "spool"


def _default_locks() -> Path:
    # Not under the Prefect home: two homes on one host must still exclude each other.
    return Path(tempfile.gettempdir()) / f"flux_prefect-{os.getuid()}" / "locks"


class FluxSettings(BaseSettings):
    """The settings, each an environment variable with the prefix `FLUX_PREFECT_`."""

    model_config = SettingsConfigDict(env_prefix="FLUX_PREFECT_", frozen=True)

    spool: Path = Field(
        default_factory=_default_spool,
        description="Folder of the pictures and records in our custody. Default: in the Prefect home.",
    )
    locks: Path = Field(
        default_factory=_default_locks,
        description="Folder of the lock files. Must be the same for all runs of one host.",
    )
    retries: int = Field(default=4, ge=0, description="Prefect retries of a step that failed for a passing reason.")
    retry_delay_seconds: list[float] = Field(
        default=[2.0, 8.0, 30.0, 60.0], min_length=1, description="Seconds before each retry; the last repeats."
    )
    repeat_unknown: int = Field(
        default=1,
        ge=0,
        description=(
            "How often a paid call whose answer was lost is sent again in one task run. "
            "Each repetition may pay a second time."
        ),
    )
