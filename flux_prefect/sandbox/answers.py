"""The bodies that the service answers with: its result shapes and its two error envelopes."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from starlette.responses import JSONResponse, Response

from flux_prefect.api.models import CREDITS_PER_USD
from flux_prefect.sandbox.schema import GenerationBody
from flux_prefect.sandbox.settings import Envelope, ResponseShape

__all__ = [
    "OUT_OF_CREDITS",
    "Cost",
    "Image",
    "error",
    "generation",
    "json_bytes",
    "media_type",
    "needs_bytes",
    "utc_now",
]

OUT_OF_CREDITS = "You've run out of credits. Please top up your balance or update your payment method to continue."

_NAMES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
_PLAIN_WHEN_MIXED = {401, 404, 405, 429}


def error(
    status: int, message: str, *, path: str, envelope: Envelope, headers: Mapping[str, str] | None = None
) -> Response:
    """An error in the envelope that is set."""
    request_id, now = str(uuid.uuid4()), utc_now()
    if envelope == "plain" or (envelope == "mixed" and status in _PLAIN_WHEN_MIXED):
        plain = {
            "message": message,
            "path": path,
            "requestId": request_id,
            # The service sends text for some errors and a number for others.
            "statusCode": str(status) if status % 2 else status,
            "timestamp": now,
        }
        return JSONResponse(plain, status, headers)
    problem = {
        "title": _NAMES.get(status, "Error"),
        "status": status,
        "message": message,
        "instance": path,
        "requestId": request_id,
        "timestamp": now,
        "error": {"name": _NAMES.get(status, "Error").replace(" ", "") + "Exception", "message": message},
    }
    return JSONResponse(problem, status, headers, media_type="application/problem+json")


def utc_now() -> str:
    """Now, as the service writes times."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Image:
    """One image of an answer: its result URL, and its bytes where the shape sends them inline."""

    url: str
    content: bytes | None
    flagged: bool


@dataclass(frozen=True)
class Cost:
    """What one call cost."""

    credits: int

    @property
    def usd(self) -> float:
        """In US dollars."""
        return self.credits / CREDITS_PER_USD


def media_type(output_format: str) -> str:
    """The MIME type of `output_format`."""
    return f"image/{output_format}"


def needs_bytes(shape: ResponseShape) -> bool:
    """Whether answers of this shape carry their images inline."""
    return shape in {"b64", "data_uri"}


def generation(request: GenerationBody, images: Sequence[Image], cost: Cost, shape: ResponseShape) -> dict[str, Any]:
    """A successful answer."""
    body: dict[str, Any] = {}
    if shape in {"images", "data_uri", "both"}:
        width, height = request.size
        body = {
            "images": [
                {
                    "url": image.url if image.content is None else _data_uri(request, image.content),
                    "width": width,
                    "height": height,
                    "content_type": media_type(request.format),
                }
                for image in images
            ],
            "timings": {},
            "seed": request.seed,
            "has_nsfw_concepts": [image.flagged for image in images],
            "prompt": request.prompt,
        }
    if shape in {"data", "b64", "both"}:
        body["data"] = [
            {"url": image.url, "b64_json": None}
            if image.content is None
            else {"url": None, "b64_json": base64.b64encode(image.content).decode("ascii")}
            for image in images
        ]
    body["meta"] = {"usage": {"credits_used": cost.credits, "usd_spent": cost.usd}}
    return body


def json_bytes(body: Any) -> bytes:
    """The body as it goes over the wire."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _data_uri(request: GenerationBody, content: bytes) -> str:
    return f"data:{media_type(request.format)};base64,{base64.b64encode(content).decode('ascii')}"
