"""Settings of one host, read from the environment.

Settings of an account or a bucket are fields of the blocks instead.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from prefect.settings import get_current_settings
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from flux_prefect.errors import InvalidSettings

__all__ = ["FluxSettings", "current_settings", "settings_at_import"]

_PREFIX = "FLUX_PREFECT_"
_MAX_SHOWN = 60  # characters, a line's worth

_Count = Annotated[int, Field(ge=0)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_ALLOWED: Mapping[Any, str] = {
    int: "a whole number, 0 or more",
    float: "a number, 0 or more",
    Path: "the path of a folder",
    Path | None: "the path of a folder",
}
_ALLOWED_LIST = "a list of numbers, 0 or more each, such as [2, 8, 30, 60]"


def _default_spool() -> Path:
    return get_current_settings().home / "flux_prefect" / "spool"


class FluxSettings(BaseSettings):
    """The settings: environment variables with the prefix `FLUX_PREFECT_`. An empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, frozen=True)

    spool: Path = Field(
        default_factory=_default_spool,
        description="Folder of paid responses and images. Default: in the Prefect home.",
    )
    locks: Path | None = Field(
        default=None,
        description=(
            "Folder of the lock files, the same for all runs of one host. Default: in the system's temporary folder "
            "and, if `spool` is set, in the spool as well."
        ),
    )
    retries: _Count = Field(default=4, description="Prefect retries of a step that failed for a temporary reason.")
    retry_delay_seconds: list[_Amount] = Field(
        default=[2.0, 8.0, 30.0, 60.0], min_length=1, description="Seconds before each retry; the last value repeats."
    )
    credits_per_image: _Amount = Field(
        default=200_000,
        description=(
            "Assumed price of an image, in credits, until the service names one or has charged for one. Ten US cents."
        ),
    )
    repeat_unknown: _Count = Field(
        default=1,
        description=(
            "How often a request is sent again after its answers were lost, over all retries and runs of this host. "
            "Each repetition may pay a second time."
        ),
    )
    url_settling_seconds: _Amount = Field(
        default=10,
        description="Seconds after an answer in which an image's URL that answers 404 is asked again instead of dead.",
    )
    url_life_seconds: _Amount = Field(
        default=600,
        description=(
            "Seconds after an answer in which an image's URL counts as alive although a host or a proxy refuses it. "
            "Nothing is paid again for a URL that is alive."
        ),
    )
    keep_published_hours: _Amount = Field(
        default=48,
        description=(
            "Hours for which the spool keeps the file of a published image after its last use. 48: the audit after "
            "the next night's run can still restore an object from it."
        ),
    )
    keep_records_days: _Amount = Field(
        default=30,
        description=(
            "Days for which the spool keeps the records of published images, and the files of images that the service "
            "delivers wrong or black."
        ),
    )
    grace_seconds: _Amount = Field(
        default=25,
        description=(
            "Seconds that a cancelled batch waits for its paid calls. Prefect kills a cancelled run after 30 seconds."
        ),
    )

    @field_validator("spool", "locks")
    @classmethod
    def _absolute(cls, folder: Path | None) -> Path | None:
        try:
            return None if folder is None else folder.expanduser().absolute()
        except RuntimeError as error:  # there is no such user
            raise ValueError(str(error)) from error

    @property
    def lock_folders(self) -> tuple[Path, ...]:
        """The folders of the lock files. A lock is held in all of them.

        The one in the temporary folder excludes runs with other spools and other Prefect homes on the host; it is
        directly there, where no other user can replace it. The one in the spool excludes runs in other containers
        that share the spool and have a temporary folder of their own.

        Raises:
            InvalidSettings: no folder is set, and the system has no temporary folder.
        """
        if self.locks is not None:
            return (self.locks,)
        in_spool = (self.spool / "locks",) if "spool" in self.model_fields_set else ()
        try:
            return Path(tempfile.gettempdir()) / f"flux_prefect-{os.getuid()}-locks", *in_spool
        except FileNotFoundError as error:
            if in_spool:
                return in_spool
            raise InvalidSettings(f"{error.strerror}: set FLUX_PREFECT_LOCKS to a folder.") from error


def settings_at_import() -> FluxSettings:
    """Return the current settings, or the defaults where a value is invalid. For use while a module is imported.

    Importing a flow, as `prefect deploy` does, must not fail for a bad value. A run calls `current_settings` before
    it pays for anything, and fails there with the reason.
    """
    try:
        return current_settings()
    except InvalidSettings:
        return FluxSettings.model_construct()


def current_settings() -> FluxSettings:
    """Read the settings from the environment. Cached until a variable changes, as reading takes milliseconds.

    Raises:
        InvalidSettings: a value is invalid.

    Example:
        ```python
        print(current_settings().spool)
        ```
    """
    return _read(tuple(map(os.environ.get, _VARIABLES)), get_current_settings().home)


_VARIABLES = tuple(f"{_PREFIX}{name.upper()}" for name in FluxSettings.model_fields)


@functools.lru_cache(maxsize=8)
def _read(values: tuple[str | None, ...], home: Path) -> FluxSettings:  # noqa: ARG001 - the cache's key
    try:
        return FluxSettings()
    except ValidationError as error:
        wrong = {str(problem["loc"][0]) for problem in error.errors()}
    except SettingsError as error:  # a list that is not JSON; only the message names it
        wrong = {name for name in FluxSettings.model_fields if f'"{name}"' in str(error)}
    raise InvalidSettings(" ".join(_explain(name) for name in FluxSettings.model_fields if name in wrong))


def _explain(name: str) -> str:
    variable = f"{_PREFIX}{name.upper()}"
    allowed = _ALLOWED.get(FluxSettings.model_fields[name].annotation, _ALLOWED_LIST)
    return f"{variable} is {os.environ.get(variable, '')[:_MAX_SHOWN]!r}: write {allowed}, or unset it."
