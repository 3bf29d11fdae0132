"""Image generation as ordinary Prefect pipeline work.

Every public name is imported from here: `from flux_prefect import ImageRequest, generate_image, publish_batch`.
Importing the package is cheap and does not import Prefect; each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flux_prefect import errors
from flux_prefect.errors import *  # noqa: F403 - the whole tree, as its module lists it

if TYPE_CHECKING:
    from flux_prefect.api.client import AimlApiClient, Timeouts
    from flux_prefect.api.downloads import DownloadedImage
    from flux_prefect.api.models import (
        CREDITS_PER_USD,
        MAX_SEED,
        AspectRatio,
        Balance,
        GeneratedImage,
        Generation,
        ImageRequest,
        ImageSettings,
        ImageSize,
        LogEntry,
        Lora,
        OutputFormat,
        SafetyTolerance,
    )
    from flux_prefect.api.pacing import Pacer, shared_pacer
    from flux_prefect.api.registry import MODELS, EditModel, FluxModel, TextToImageModel
    from flux_prefect.batch.days import BackfillReport, DayOutcome
    from flux_prefect.bucket.image_bucket import ImageBucket
    from flux_prefect.bucket.published_image import PublishedImage, PublishingRun
    from flux_prefect.cache_policies import PromptSeedCachePolicy
    from flux_prefect.credentials import AimlApiCredentials
    from flux_prefect.custody import CallOutcome
    from flux_prefect.flows.audit_bucket import audit_bucket
    from flux_prefect.flows.backfill import backfill
    from flux_prefect.flows.publish_batch import publish_batch
    from flux_prefect.flows.publish_daily import publish_daily
    from flux_prefect.flows.publish_image import publish_image
    from flux_prefect.flows.publish_sharded import publish_sharded
    from flux_prefect.flows.sweep_seeds import SweepReport, sweep_seeds
    from flux_prefect.host.locks import HostLockManager
    from flux_prefect.host.spool import ImageFile, PaidCall, Spool
    from flux_prefect.inline import run_inline
    from flux_prefect.manifest.audit import AuditedImage, AuditReport
    from flux_prefect.manifest.plan import Plan
    from flux_prefect.manifest.records import ItemRecord, ItemStatus
    from flux_prefect.manifest.report import BatchReport
    from flux_prefect.money.budget import Budget, spending_from
    from flux_prefect.money.ledger import Amount
    from flux_prefect.pipeline import ImageOutcome, Production, Status, check_ready, produce_image, run_as_task
    from flux_prefect.sandbox.control import SandboxControl
    from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox
    from flux_prefect.seeds import draw_day_seed, draw_seed, with_seed
    from flux_prefect.settings import FluxSettings, current_settings
    from flux_prefect.tables.table import Row, Table, open_table, read_table
    from flux_prefect.tasks import download_image, find_published, generate_image, upload_to_s3

    __version__: str

__all__ = [
    "CREDITS_PER_USD",
    "MAX_SEED",
    "MODELS",
    "AimlApiClient",
    "AimlApiCredentials",
    "Amount",
    "AspectRatio",
    "AuditReport",
    "AuditedImage",
    "BackfillReport",
    "Balance",
    "BatchReport",
    "Budget",
    "CallOutcome",
    "DayOutcome",
    "DownloadedImage",
    "EditModel",
    "FluxModel",
    "FluxSettings",
    "GeneratedImage",
    "Generation",
    "HostLockManager",
    "ImageBucket",
    "ImageFile",
    "ImageOutcome",
    "ImageRequest",
    "ImageSettings",
    "ImageSize",
    "ItemRecord",
    "ItemStatus",
    "LogEntry",
    "Lora",
    "OutputFormat",
    "Pacer",
    "PaidCall",
    "Plan",
    "Production",
    "PromptSeedCachePolicy",
    "PublishedImage",
    "PublishingRun",
    "Row",
    "RunningSandbox",
    "SafetyTolerance",
    "SandboxControl",
    "Spool",
    "Status",
    "SweepReport",
    "Table",
    "TextToImageModel",
    "Timeouts",
    "__version__",
    "audit_bucket",
    "backfill",
    "check_ready",
    "current_settings",
    "download_image",
    "draw_day_seed",
    "draw_seed",
    "find_published",
    "generate_image",
    "open_table",
    "produce_image",
    "publish_batch",
    "publish_daily",
    "publish_image",
    "publish_sharded",
    "read_table",
    "run_as_task",
    "run_inline",
    "shared_pacer",
    "spending_from",
    "start_sandbox",
    "sweep_seeds",
    "upload_to_s3",
    "with_seed",
]
__all__ += errors.__all__

_OWNERS = {
    "api.client": ("AimlApiClient", "Timeouts"),
    "api.downloads": ("DownloadedImage",),
    "api.models": (
        "CREDITS_PER_USD",
        "MAX_SEED",
        "AspectRatio",
        "Balance",
        "GeneratedImage",
        "Generation",
        "ImageRequest",
        "ImageSettings",
        "ImageSize",
        "LogEntry",
        "Lora",
        "OutputFormat",
        "SafetyTolerance",
    ),
    "api.registry": ("MODELS", "EditModel", "FluxModel", "TextToImageModel"),
    "api.pacing": ("Pacer", "shared_pacer"),
    "batch.days": ("BackfillReport", "DayOutcome"),
    "bucket.image_bucket": ("ImageBucket",),
    "bucket.published_image": ("PublishedImage", "PublishingRun"),
    "cache_policies": ("PromptSeedCachePolicy",),
    "credentials": ("AimlApiCredentials",),
    "flows.audit_bucket": ("audit_bucket",),
    "manifest.audit": ("AuditedImage", "AuditReport"),
    "flows.backfill": ("backfill",),
    "flows.publish_batch": ("publish_batch",),
    "flows.publish_daily": ("publish_daily",),
    "flows.publish_image": ("publish_image",),
    "flows.publish_sharded": ("publish_sharded",),
    "flows.sweep_seeds": ("SweepReport", "sweep_seeds"),
    "host.locks": ("HostLockManager",),
    "host.spool": ("ImageFile", "PaidCall", "Spool"),
    "inline": ("run_inline",),
    "manifest.plan": ("Plan",),
    "manifest.records": ("ItemRecord", "ItemStatus"),
    "manifest.report": ("BatchReport",),
    "money.budget": ("Budget", "spending_from"),
    "money.ledger": ("Amount",),
    "pipeline": ("ImageOutcome", "Production", "Status", "check_ready", "produce_image", "run_as_task"),
    "sandbox.control": ("SandboxControl",),
    "sandbox.launching": ("RunningSandbox", "start_sandbox"),
    "seeds": ("draw_day_seed", "draw_seed", "with_seed"),
    "settings": ("FluxSettings", "current_settings"),
    "custody": ("CallOutcome",),
    "tables.table": ("Row", "Table", "open_table", "read_table"),
    "tasks": ("download_image", "find_published", "generate_image", "upload_to_s3"),
}
"""The names that are loaded when they are first used, by the module that defines them."""

_MODULES = {name: f"{__name__}.{module}" for module, names in _OWNERS.items() for name in names}


if not TYPE_CHECKING:  # a checker would take any name for an attribute

    def __getattr__(name: str) -> Any:
        value: Any
        if name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        elif name == "__version__":
            from importlib.metadata import version  # noqa: PLC0415 - half of the package's own import time

            value = version(__name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # found at once from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
