"""A paid answer as it came, before anything is made of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from flux_prefect.api.models import Generation, ImageRequest, parse_generation

__all__ = ["RawAnswer", "read_answer", "read_json"]

_HEADERS = ("x-aimlapi-credits-used", "x-aimlapi-usd-spent", "x-inference-id")


class RawAnswer(BaseModel):
    """The body of a success and the headers that matter. Holds no key."""

    model_config = ConfigDict(frozen=True)

    body: str = Field(description="The body; in Base64 where it is not UTF-8.")
    is_base64: bool = Field(default=False, description="Whether the body is in Base64.")
    headers: dict[str, str] = Field(default_factory=dict, description="The service's cost and id headers.")
    received_at: AwareDatetime = Field(description="When it came.")

    @classmethod
    def of(cls, body: bytes, headers: Mapping[str, str]) -> RawAnswer:
        """An answer from what came over the network, now."""
        kept = {name: headers[name] for name in _HEADERS if name in headers}
        now = datetime.now(timezone.utc)
        try:
            return cls(body=body.decode("utf-8"), headers=kept, received_at=now)
        except UnicodeDecodeError:
            return cls(body=base64.b64encode(body).decode("ascii"), is_base64=True, headers=kept, received_at=now)

    @property
    def content(self) -> bytes:
        """The body's bytes."""
        return base64.b64decode(self.body) if self.is_base64 else self.body.encode("utf-8")


def read_json(body: bytes) -> Any:
    """The JSON value of a body, or its text where it is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", errors="replace")


def read_answer(answer: RawAnswer, *, request: ImageRequest, endpoint: str, client_request_id: str) -> Generation:
    """The generation of an answer.

    Raises:
        InvalidResponse, EmptyGeneration: as `parse_generation`.
    """
    return parse_generation(
        read_json(answer.content),
        answer.headers,
        request=request,
        endpoint=endpoint,
        client_request_id=client_request_id,
        created_at=answer.received_at,
    )
