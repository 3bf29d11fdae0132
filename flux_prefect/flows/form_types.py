"""Parameter types of the flows, and their titles in Prefect's forms.

Prefect shows a parameter of several types as tabs, each labelled with the title of its type. The tab of a block type
lists the saved blocks and has a button to create one. The older of Prefect's two UIs ignores titles of references and
labels this tab with the name of the block's class.

The title of a block's class must stay its name: Prefect's server uses it to find parameters that accept blocks.
"""

from __future__ import annotations

from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.tables.table import Only

__all__ = [
    "BucketChoice",
    "CredentialsChoice",
    "CreditCap",
    "ImageCap",
    "InFlight",
    "RowsChoice",
    "RowsExpected",
    "TableChoice",
    "Template",
    "TemplateTable",
    "Timezone",
    "Tolerated",
]

TableChoice = (
    Annotated[str, Field(title="File")]
    | Annotated[list[ImageRequest], Field(title="Requests")]
    | Annotated[list[dict[str, Any]], Field(title="Rows")]
)
"""A prompt table, for `open_table`."""

RowsChoice = Annotated[Only, Field(title="Some rows")] | Annotated[None, Field(title="All rows")]
"""The rows of a manifest to try again, or None for all rows."""

TemplateTable = Annotated[str, Field(title="File")] | Annotated[list[dict[str, Any]], Field(title="Rows")]
"""A table of prompt templates, for `render_table`."""

Template = Annotated[str, Field(title="Template")] | Annotated[None, Field(title="None")]
"""The prompt of rows without one."""


def _known_timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"timezone {name!r} is unknown: write it as Europe/Berlin or UTC") from error
    return name


Timezone = Annotated[str, AfterValidator(_known_timezone)]
"""The name of a time zone."""

BucketChoice = Annotated[ImageBucket, Field(title="Saved block")] | Annotated[str, Field(title="Name or s3://…")]
"""A bucket, for `ImageBucket.resolve`."""

CredentialsChoice = (
    Annotated[AimlApiCredentials, Field(title="Saved block")]
    | Annotated[str, Field(title="Name")]
    | Annotated[None, Field(title="Environment")]
)
"""An account, for `AimlApiCredentials.resolve`."""

InFlight = Annotated[int, Field(ge=1, le=1000)]
"""The most paid calls at the same time."""

Tolerated = Annotated[int, Field(ge=0)]
"""The number of rows that may fail."""

RowsExpected = Annotated[int, Field(ge=0)]
"""The number of rows that a table has at least."""

CreditCap = Annotated[float, Field(ge=0, title="Credits")] | Annotated[None, Field(title="No cap")]
"""A hard cap in credits, or None for no cap."""

ImageCap = Annotated[int, Field(ge=0, title="Images")] | Annotated[None, Field(title="No cap")]
"""A hard cap in images, or None for no cap."""
