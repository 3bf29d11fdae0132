"""The faults that can be injected, each by one function.

Its name is the fault's, its docstring the description, its keyword arguments what can be set. Faults are armed
over HTTP, each for a number of calls or for good.
"""

from __future__ import annotations

import inspect
import io
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, Protocol, get_type_hints

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from flux_prefect.sandbox import answers
from flux_prefect.sandbox.painting.painter import encode
from flux_prefect.sandbox.schema import GenerationBody, explain
from flux_prefect.sandbox.settings import Envelope
from flux_prefect.sandbox.wire import Cut, Flood, Reset, Silence, Trickle

__all__ = [
    "FAULTS",
    "ArmedFault",
    "ArmedFaults",
    "Delivery",
    "FaultKind",
    "FinishedCall",
    "PendingCall",
    "Strike",
    "UnknownFault",
    "When",
]

When = Literal["before_work", "after_work", "download"]

GATEWAY_PAGE = "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
HTML_PAGE = "<!doctype html><html><head><title>One moment</title></head><body>Checking your browser…</body></html>"


class UnknownFault(Exception):
    """No such fault, or it doesn't take these arguments."""


# ------------------------------------------------------------------ what a fault is given


@dataclass(frozen=True)
class PendingCall:
    """A call whose work has not begun."""

    path: str
    envelope: Envelope

    def error(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
        """An error as the service words it."""
        return answers.error(status, message, path=self.path, envelope=self.envelope, headers=headers)


@dataclass(frozen=True)
class FinishedCall(PendingCall):
    """A call whose work is done and billed, with the answer that would be right."""

    body: dict[str, Any]
    headers: dict[str, str]

    def answer(self, body: dict[str, Any] | bytes) -> Response:
        """A 200 with another body."""
        content = body if isinstance(body, bytes) else answers.json_bytes(body)
        return Response(content, media_type="application/json", headers=self.headers)


@dataclass(frozen=True)
class Delivery:
    """A live result URL that was asked for."""

    request: GenerationBody
    content: bytes
    name: str
    pending: PendingCall

    @property
    def media_type(self) -> str:
        """What the image is."""
        return answers.media_type(self.request.format)

    def file(self, content: bytes) -> Response:
        """A 200 with other bytes under the right type."""
        return Response(content, media_type=self.media_type)


# ------------------------------------------------------------------ the registry


class _Strike(Protocol):
    def __call__(self, target: Any, /, **arguments: Any) -> ASGIApp: ...


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault."""

    name: str
    when: When
    summary: str
    arguments: type[BaseModel]
    strike: _Strike
    black: bool = False

    @property
    def billed(self) -> bool:
        """Whether the call that it strikes has been charged for."""
        return self.when != "before_work"


FAULTS: dict[str, FaultKind] = {}
"""Every fault by its name. Filled by the decorators below and never changed after import."""

P = ParamSpec("P")


def _register(when: When, strike: Callable[..., ASGIApp], *, black: bool) -> None:
    hints = get_type_hints(strike, include_extras=True)
    settable = {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(strike).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    name = strike.__name__
    FAULTS[name] = FaultKind(
        name=name,
        when=when,
        summary=inspect.getdoc(strike) or "",
        arguments=create_model(name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **settable),  # type: ignore[call-overload] # the fields are only known here
        strike=strike,
        black=black,
    )


def _before_work(
    strike: Callable[Concatenate[PendingCall, P], ASGIApp],
) -> Callable[Concatenate[PendingCall, P], ASGIApp]:
    _register("before_work", strike, black=False)
    return strike


def _after_work(
    strike: Callable[Concatenate[FinishedCall, P], ASGIApp],
) -> Callable[Concatenate[FinishedCall, P], ASGIApp]:
    _register("after_work", strike, black=False)
    return strike


def _blacked_out(
    strike: Callable[Concatenate[FinishedCall, P], ASGIApp],
) -> Callable[Concatenate[FinishedCall, P], ASGIApp]:
    _register("after_work", strike, black=True)
    return strike


def _download(
    strike: Callable[Concatenate[Delivery, P], ASGIApp],
) -> Callable[Concatenate[Delivery, P], ASGIApp]:
    _register("download", strike, black=False)
    return strike


# ------------------------------------------------------------------ generation, not billed

Seconds = Annotated[float, Field(ge=0)]
RetryAfter = float | Annotated[str, Field(pattern=r"^[ -~]+$")] | None


def _retry_after(value: RetryAfter) -> dict[str, str]:
    """Seconds as a number; "date+30" as the HTTP date 30 seconds from now; any other text as it is."""
    if value is None:
        return {}
    if isinstance(value, float):
        return {"Retry-After": f"{value:g}"}
    ahead = re.fullmatch(r"date\+(\d{1,6})", value)
    if ahead is None:
        return {"Retry-After": value}
    moment = datetime.now(timezone.utc) + timedelta(seconds=int(ahead[1]))
    return {"Retry-After": format_datetime(moment, usegmt=True)}


@_before_work
def rate_limited(call: PendingCall, *, retry_after: RetryAfter = None) -> ASGIApp:
    """429. `retry_after`: seconds, or "date+30" for the HTTP date in 30 seconds, or nothing."""
    return call.error(429, "Too many requests. Please slow down.", _retry_after(retry_after))


@_before_work
def overloaded(call: PendingCall, *, retry_after: RetryAfter = None) -> ASGIApp:
    """503. `retry_after` as for rate_limited."""
    return call.error(503, "The service is overloaded. Please try again later.", _retry_after(retry_after))


@_before_work
def server_error(call: PendingCall) -> ASGIApp:
    """500 from the model behind the service."""
    return call.error(500, "The upstream provider failed to process the request.")


@_before_work
def bad_gateway(_: PendingCall) -> ASGIApp:
    """502 with a proxy's HTML page."""
    return HTMLResponse(GATEWAY_PAGE, status_code=502)


@_before_work
def gateway_timeout_unbilled(call: PendingCall) -> ASGIApp:
    """504, and the work was never done."""
    return call.error(504, "Generation timeout")


@_before_work
def reset_before_work(_: PendingCall) -> ASGIApp:
    """The connection is reset before anything is done."""
    return Reset()


@_before_work
def hang(_: PendingCall, *, seconds: Seconds = 3600) -> ASGIApp:
    """No answer for `seconds`, then the connection is closed; nothing is done."""
    return Silence(seconds)


@_before_work
def moderation(call: PendingCall) -> ASGIApp:
    """400: the prompt is refused by moderation."""
    return call.error(400, "The prompt was rejected by the content moderation system.")


@_before_work
def out_of_credits(call: PendingCall) -> ASGIApp:
    """403: the account has no credits left, whatever its balance."""
    return call.error(403, answers.OUT_OF_CREDITS)


@_before_work
def forbidden(call: PendingCall) -> ASGIApp:
    """403 for another reason than credits."""
    return call.error(403, "Your plan does not include access to this model.")


@_before_work
def unauthorized(call: PendingCall) -> ASGIApp:
    """401, though the key is right."""
    return call.error(401, "Invalid API key provided.")


@_before_work
def not_found(call: PendingCall) -> ASGIApp:
    """404, as for a withdrawn model."""
    return call.error(404, "Model not found.")


# ------------------------------------------------------------------ generation, billed


@_after_work
def gateway_timeout_billed(call: FinishedCall) -> ASGIApp:
    """504 after the work was billed."""
    return call.error(504, "Generation timeout")


@_after_work
def reset_after_work(_: FinishedCall) -> ASGIApp:
    """The connection is reset after the work was billed."""
    return Reset()


@_after_work
def hang_billed(_: FinishedCall, *, seconds: Seconds = 3600) -> ASGIApp:
    """The work is billed, then no answer for `seconds`."""
    return Silence(seconds)


@_after_work
def slow_trickle(call: FinishedCall, *, seconds: Seconds = 5) -> ASGIApp:
    """A right answer whose body trickles in over `seconds`."""
    return Trickle(answers.json_bytes(call.body), "application/json", seconds, headers=call.headers)


@_blacked_out
def flagged(call: FinishedCall) -> ASGIApp:
    """200 with has_nsfw_concepts true and a black image."""
    flags = [True] * len(call.body.get("images") or call.body["data"])
    return call.answer({**call.body, "has_nsfw_concepts": flags})


@_blacked_out
def black(call: FinishedCall) -> ASGIApp:
    """200 with a black image that nothing marks."""
    return call.answer(call.body)


@_after_work
def empty_list(call: FinishedCall) -> ASGIApp:
    """200 with an empty list of images."""
    return call.answer(_with_images(call.body, lambda _: []))


@_after_work
def null_data(call: FinishedCall) -> ASGIApp:
    """200 with `data` null, which the schema allows."""
    return call.answer({"data": None, "meta": call.body["meta"]})


@_after_work
def invalid_json(call: FinishedCall) -> ASGIApp:
    """200 whose whole body is no JSON."""
    return call.answer(answers.json_bytes(call.body)[:-1])


@_after_work
def html_200(_: FinishedCall) -> ASGIApp:
    """200 with a proxy's HTML page, and no word of the cost."""
    return HTMLResponse(HTML_PAGE)


@_after_work
def cut_json(call: FinishedCall) -> ASGIApp:
    """200 whose body ends half way: fewer bytes than its content-length."""
    return Cut(answers.json_bytes(call.body), "application/json", headers=call.headers)


@_after_work
def wrong_seed(call: FinishedCall) -> ASGIApp:
    """200 that reports another seed than asked for."""
    return call.answer({**call.body, "seed": call.body.get("seed", 0) + 1})


@_after_work
def fewer_images(call: FinishedCall) -> ASGIApp:
    """200 with one image fewer than asked and billed for."""
    return call.answer(_with_images(call.body, lambda images: images[:-1]))


def _with_images(body: dict[str, Any], change: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
    lists = {"images", "data", "has_nsfw_concepts"}
    return {key: change(value) if key in lists else value for key, value in body.items()}


# ------------------------------------------------------------------ download


@_download
def dead_url(delivery: Delivery) -> ASGIApp:
    """404, as if the URL had expired."""
    return delivery.pending.error(404, "The requested file does not exist.")


@_download
def gone_403(_: Delivery) -> ASGIApp:
    """403 with a bucket's XML, as expired signed URLs give."""
    return Response(
        "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
        403,
        media_type="application/xml",
    )


@_download
def cut_download(delivery: Delivery) -> ASGIApp:
    """200 that ends half way: fewer bytes than its content-length."""
    return Cut(delivery.content, delivery.media_type)


@_download
def reset_download(delivery: Delivery) -> ASGIApp:
    """200 that is reset half way."""
    return Cut(delivery.content, delivery.media_type, reset=True)


@_download
def stall_download(delivery: Delivery, *, seconds: Seconds = 3600) -> ASGIApp:
    """200 that falls silent half way, for `seconds`."""
    return Cut(delivery.content, delivery.media_type, stall=seconds)


@_download
def html_download(_: Delivery) -> ASGIApp:
    """200 with a page of HTML."""
    return HTMLResponse(HTML_PAGE)


@_download
def wrong_type(delivery: Delivery) -> ASGIApp:
    """The right image as PNG where JPEG or WEBP was asked for, and as JPEG where PNG was."""
    other = "jpeg" if delivery.request.format == "png" else "png"
    with Image.open(io.BytesIO(delivery.content)) as image:
        return Response(encode(image.convert("RGB"), other), media_type=answers.media_type(other))


@_download
def corrupt_download(delivery: Delivery) -> ASGIApp:
    """The right first bytes and nonsense after, all of it delivered."""
    return delivery.file(delivery.content[:24] + b"\x5a" * (len(delivery.content) - 24))


@_download
def truncated_image(delivery: Delivery) -> ASGIApp:
    """A whole answer, but the file in it is cut."""
    return delivery.file(delivery.content[: len(delivery.content) * 2 // 3])


@_download
def huge_download(delivery: Delivery, *, megabytes: float = 4096) -> ASGIApp:
    """A body without content-length that goes on for `megabytes`."""
    return Flood(delivery.content, delivery.media_type, round(megabytes * 1_000_000))


@_download
def bomb(delivery: Delivery) -> ASGIApp:
    """A small file that claims to be 65,500 pixels square; 16,383 as WEBP, which can say no more."""
    return delivery.file(_inflate(delivery.request.format))


@_download
def download_503(delivery: Delivery, *, retry_after: RetryAfter = None) -> ASGIApp:
    """503 from the file host. `retry_after` as for rate_limited."""
    return delivery.pending.error(503, "Slow down.", _retry_after(retry_after))


@_download
def redirect_loop(delivery: Delivery) -> ASGIApp:
    """A redirect to a place that redirects to itself for ever."""
    return RedirectResponse(f"/files/loop/{delivery.name}", status_code=302)


@_download
def redirect_private(_: Delivery, *, location: str = "http://169.254.169.254/latest/meta-data/") -> ASGIApp:
    """A redirect to `location`: a cloud's metadata service, a file, another host."""
    return RedirectResponse(location, status_code=302)


def _inflate(output_format: str) -> bytes:
    side = 65_500
    file = encode(Image.new("RGB", (16, 16)), output_format)
    if output_format == "png":
        header = b"IHDR" + struct.pack(">II", side, side) + file[24:29]
        return file[:12] + header + zlib.crc32(header).to_bytes(4, "big") + file[33:]
    if output_format == "webp":  # RIFF and chunk headers, frame tag and start code; then width and height
        return file[:26] + struct.pack("<HH", 16_383, 16_383) + file[30:]
    start = file.index(b"\xff\xc0") + 5  # SOF0: marker, length, precision, then height and width
    return file[:start] + struct.pack(">HH", side, side) + file[start + 4 :]


# ------------------------------------------------------------------ armed faults


class ArmedFault(BaseModel):
    """A fault that waits for its calls. What else it holds are the fault's own arguments."""

    model_config = ConfigDict(extra="allow")

    fault: str = Field(description="Which; see /sandbox/faults/names.")
    times: int | None = Field(default=1, ge=1, description="How many calls it strikes. None: all, until cleared.")
    prompt_contains: str | None = Field(default=None, description="It strikes only where the prompt holds this.")

    @property
    def arguments(self) -> dict[str, Any]:
        """The fault's own arguments."""
        return self.model_extra or {}


@dataclass(frozen=True)
class Strike:
    """One fault, about to happen."""

    kind: FaultKind
    arguments: dict[str, Any]

    def on(self, target: PendingCall | Delivery) -> ASGIApp:
        """What is sent instead of the right answer."""
        return self.kind.strike(target, **self.arguments)


class ArmedFaults:
    """The faults that are armed, the oldest first. They are gone when the process ends."""

    def __init__(self) -> None:
        self._armed: list[ArmedFault] = []

    def arm(self, fault: ArmedFault) -> ArmedFault:
        """Add one.

        Raises:
            UnknownFault: the name or an argument is wrong; the message says what there is.
        """
        kind = FAULTS.get(fault.fault)
        if kind is None:
            raise UnknownFault(f"fault {fault.fault!r} does not exist: choose one of {', '.join(FAULTS)}")
        try:
            arguments = kind.arguments.model_validate(fault.arguments)
        except ValidationError as error:
            raise UnknownFault(f"{fault.fault}: {explain(error)}") from error
        armed = fault.model_copy(update=arguments.model_dump())
        self._armed.append(armed)
        return armed

    def take(self, prompt: str, *when: When) -> Strike | None:
        """The fault that strikes now, if any: it is used up by one."""
        for place, armed in enumerate(self._armed):
            kind = FAULTS[armed.fault]
            if kind.when not in when or (armed.prompt_contains or "") not in prompt:
                continue
            if armed.times is not None:
                if armed.times == 1:
                    del self._armed[place]
                else:
                    self._armed[place] = armed.model_copy(update={"times": armed.times - 1})
            return Strike(kind, armed.arguments)
        return None

    def all(self) -> list[ArmedFault]:
        """The armed faults, with the times that are left."""
        return list(self._armed)

    def clear(self) -> None:
        """Disarm all."""
        self._armed.clear()
