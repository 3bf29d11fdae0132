"""What release 0.1.0 left in a bucket: one image, its record beside it, and the manifests of its run.

`tests/data/bucket-at-9689176.json` holds the objects with their headers as that commit published them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket

ENDPOINT, PREFIX, FINGERPRINT = "http://127.0.0.1:18080", "team/", "730c0a6fb4addea55dea3f083df7a395"
ROW: dict[str, Any] = {"id": "red", "prompt": "a red lighthouse", "seed": 1, "aspect_ratio": "9:21"}
REQUEST = ImageRequest(prompt="a red lighthouse", seed=1, aspect_ratio="9:21")

_OBJECTS = Path(__file__).parents[1] / "data" / "bucket-at-9689176.json"


def restore(bucket: ImageBucket, endpoint: str) -> None:
    """Put the objects into a bucket's prefix, as if they had been published there from this endpoint."""

    def move(text: str) -> str:
        for old, new in (
            (ENDPOINT, endpoint),
            (PREFIX, f"{bucket.prefix}/"),
            (FINGERPRINT, REQUEST.fingerprint(endpoint)),
        ):
            text = text.replace(old, new)
        return text

    client = bucket.get_client()
    for key, stored in json.loads(_OBJECTS.read_text()).items():
        text = stored.pop("text", None)
        body = base64.b64decode(stored.pop("base64")) if text is None else move(text).encode()
        stored["Metadata"] = {name: move(value) for name, value in stored["Metadata"].items()}
        client.put_object(Bucket=bucket.bucket_name, Key=move(key), Body=body, **stored)
