"""Typed errors for responses with an error status."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any

from flux_prefect.api.retrying import parse_retry_after
from flux_prefect.errors import (
    AccessRefused,
    AuthenticationFailed,
    GenerationTimedOut,
    NotFound,
    OutOfCredits,
    RateLimited,
    RequestRefused,
    ServerFailed,
    ServiceBusy,
    StatusError,
)

__all__ = ["parse_error_response"]

_MAX_MESSAGE = 500
"""Characters of the service's message that an error keeps."""

_BY_STATUS: dict[int, type[StatusError]] = {
    401: AuthenticationFailed,
    403: AccessRefused,
    404: NotFound,
    429: RateLimited,
    503: ServiceBusy,
    **dict.fromkeys((408, 504, *range(520, 528)), GenerationTimedOut),
}

_ADVICE: dict[type[StatusError], str] = {
    RequestRefused: "It will refuse this request again: correct it first.",
    AuthenticationFailed: "Check the API key (api_key, AIMLAPI_KEY).",
    AccessRefused: "Check what the account of this API key may do.",
    OutOfCredits: "Add credits to the account and run again: what is published is not paid twice.",
    NotFound: "Check base_url (the root, without /v1) and model.",
    RateLimited: "Lower max_in_flight, or run later.",
    ServerFailed: "Failed requests are not charged.",
    ServiceBusy: "Not charged. It is overloaded or under maintenance: repeat later.",
    GenerationTimedOut: "The image may have been made and paid for all the same.",
}


def parse_error_response(  # noqa: PLR0913 - keyword-only, the parts of one answer
    *,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    client_request_id: str | None,
    now: datetime,
    redact: Callable[[str], str],
) -> StatusError:
    """Parse a response with a status other than 2xx into its typed error, with the service's own message.

    Reads both error envelopes of the service. Any other body is accepted too, as it may come from a proxy.

    Args:
        status: the HTTP status. A status in the body is ignored.
        headers: the response's headers, looked up in lower case.
        body: the part of the body that was read.
        client_request_id: this package's id of the call.
        now: the current time, for a Retry-After that is a date.
        redact: removes secrets from a text.
    """
    envelope = _read_json(body)
    said = _shorten(redact(_read_message(envelope) or _read_plain(body, envelope)))
    request_id = _read_text(envelope, "requestId")
    kind = _classify(status, said)
    parts = [f"The service answered {status}{_phrase(status)}{f': {said}' if said else ''}."]
    if 300 <= status < 400:  # noqa: PLR2004 - the redirects
        target = _shorten(redact(headers.get("location", "another place")))
        parts.append(f"It redirects to {target}; a paid call is never redirected: correct base_url.")
    else:
        parts.append(_ADVICE[kind])
    if client_request_id is not None:
        parts.append(f"Our id of the call: {client_request_id}.")
    return kind(
        " ".join(parts),
        status=status,
        request_id=redact(request_id) if request_id else None,
        client_request_id=client_request_id,
        retry_after=parse_retry_after(headers.get("retry-after"), now),
    )


def _classify(status: int, said: str) -> type[StatusError]:
    if status in {402, 403} and any(word in said.lower() for word in ("credit", "balance")):
        return OutOfCredits
    return _BY_STATUS.get(status, ServerFailed if status >= 500 else RequestRefused)  # noqa: PLR2004


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_message(envelope: dict[str, Any]) -> str | None:
    error = envelope.get("error")
    inner = error if isinstance(error, dict) else {}
    return (
        _read_text(envelope, "message")
        or _read_text(inner, "message")
        or _read_text(envelope, "error")
        or _read_text(envelope, "detail")
        or _read_text(envelope, "title")
    )


def _read_text(envelope: dict[str, Any], name: str) -> str | None:
    value = envelope.get(name)
    if isinstance(value, list):  # one message for each invalid field
        value = "; ".join(item for item in value if isinstance(item, str))
    return value if isinstance(value, str) and value.strip() else None


def _read_plain(body: bytes, envelope: dict[str, Any]) -> str:
    text = body.decode("utf-8", errors="replace")
    if envelope or not text.strip():
        return text
    return "a page of HTML, so perhaps a proxy's answer" if "<html" in text[:2000].lower() else text


def _shorten(text: str) -> str:
    # Lone surrogates are legal in JSON and break logs and databases.
    line = " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split()).rstrip(".")
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 1]}…"


def _phrase(status: int) -> str:
    try:
        return f" {HTTPStatus(status).phrase}"
    except ValueError:
        return ""
