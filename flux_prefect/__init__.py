"""Image generation as ordinary Prefect pipeline work.

The package's root holds nothing but the blocks, for `prefect block register -m flux_prefect`. Everything is imported
from the module that owns it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_BLOCKS = {"AimlApiCredentials": "flux_prefect.credentials", "ImageBucket": "flux_prefect.bucket.image_bucket"}


def __getattr__(name: str) -> Any:
    # Late, so that the sandbox and the bare client start without Prefect.
    if name in _BLOCKS:
        return getattr(import_module(_BLOCKS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_BLOCKS])
