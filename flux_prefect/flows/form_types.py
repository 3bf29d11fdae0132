"""How the parameters of flows show in Prefect's forms.

A parameter of several types is a row of tabs there, each labelled with the title of its type. A block among them is a
list of the saved ones, with a button that makes a new one; the label of that tab is the block's class in the older of
Prefect's two UIs, which overlooks titles of references.

The block's class itself must keep its name as the title: Prefect's server finds by it which parameters may be blocks.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials

__all__ = ["BucketChoice", "CredentialsChoice", "CreditCap", "ImageCap", "InFlight", "Tolerated"]

BucketChoice = Annotated[ImageBucket, Field(title="Saved block")] | Annotated[str, Field(title="Name or s3://…")]
"""A bucket, for `ImageBucket.resolve`."""

CredentialsChoice = (
    Annotated[AimlApiCredentials, Field(title="Saved block")]
    | Annotated[str, Field(title="Name")]
    | Annotated[None, Field(title="Environment")]
)
"""An account, for `AimlApiCredentials.resolve`."""

InFlight = Annotated[int, Field(ge=1, le=1000)]
"""How many paid calls at once."""

Tolerated = Annotated[int, Field(ge=0)]
"""How many items may fail."""

CreditCap = Annotated[float, Field(ge=0, title="Credits")] | Annotated[None, Field(title="No cap")]
"""A hard cap in credits, or none."""

ImageCap = Annotated[int, Field(ge=0, title="Images")] | Annotated[None, Field(title="No cap")]
"""A hard cap in images, or none."""
