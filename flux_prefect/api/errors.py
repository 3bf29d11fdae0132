"""Everything that can go wrong with one picture, as one tree.

    FluxError                        retryable, retry_after, billed, fatal
    ├── ServiceError                 the call to the image service
    │   ├── NotSent                  no connection: nothing was sent
    │   ├── AnswerLost               sent, and no whole answer came back: perhaps paid
    │   ├── InvalidResponse          a 2xx answer that is not what the API describes
    │   ├── EmptyGeneration          a 2xx answer without the picture asked for
    │   └── StatusError              an answer with an error status
    │       ├── RequestRefused       400, 413, 422 and any other 4xx: the request itself
    │       ├── AuthenticationFailed 401
    │       ├── AccessRefused        403
    │       │   └── OutOfCredits     403 or 402 that says so
    │       ├── NotFound             404: path or model
    │       ├── RateLimited          429, still so when the time for waiting was over
    │       └── ServerFailed         500, 502, ...
    │           ├── ServiceBusy      503
    │           └── GenerationTimedOut  408, 504, 520 to 527: perhaps paid
    ├── DownloadError                a picture that was paid for, on its way to us
    │   ├── ImageGone                its URL is dead
    │   ├── DownloadInterrupted      cut, stalled or refused for now
    │   ├── NotAnImage               the bytes are no picture, or do not decode
    │   ├── UnexpectedFormat         a good picture in another format than asked for
    │   ├── ImageTooLarge            over the cap in bytes or pixels
    │   ├── ImageUnwritable          the disk does not take it
    │   └── UnsafeURL                a URL that must not be fetched
    └── ContentFlagged               the service blanked or flagged the picture

Every error can be pickled, as Prefect persists it with the run's state.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


class Billed(str, Enum):
    """What a failure means for money."""

    NO = "not billed"
    YES = "billed"
    UNKNOWN = "possibly billed"


class FluxError(Exception):
    """The root of the tree.

    Attributes:
        retryable: repeating the same step later can help.
        retry_after: seconds that the other side asked us to wait, where it did.
        billed: whether the call that failed was paid for.
        fatal: the next item would fail for the same reason, so a batch stops sending.
    """

    retryable: bool = False
    billed: Billed = Billed.NO
    fatal: bool = False

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        billed: Billed | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        if billed is not None:
            self.billed = billed
        if retryable is not None:
            self.retryable = retryable

    @property
    def message(self) -> str:
        """What happened and what to do next."""
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from args alone unless told otherwise; ours carry more.
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(cls: type[FluxError], args: tuple[Any, ...]) -> FluxError:
    error = cls.__new__(cls)
    error.args = args
    return error


class ServiceError(FluxError):
    """A call to the image service that gave no generation.

    Attributes:
        client_request_id: our id of the call, to be found in the service's log.
        credits_used: what the call cost all the same, in credits, where the service said so.
    """

    def __init__(
        self,
        message: str,
        *,
        client_request_id: str | None = None,
        credits_used: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(message, **kwargs)
        self.client_request_id = client_request_id
        self.credits_used = credits_used


class NotSent(ServiceError):
    """No connection could be made or the request could not be written: nothing was paid."""

    retryable = True


class AnswerLost(ServiceError):
    """The request was sent and its answer never came back whole: it may have been paid."""

    retryable = True
    billed = Billed.UNKNOWN


class InvalidResponse(ServiceError):
    """A success status with a body that the API does not describe: it may have been paid."""

    retryable = True
    billed = Billed.UNKNOWN


class EmptyGeneration(ServiceError):
    """A success status without the picture asked for. `billed` follows the credits that it reports."""

    retryable = True
    billed = Billed.UNKNOWN


class StatusError(ServiceError):
    """An answer with an error status.

    Attributes:
        status: the HTTP status.
        request_id: the service's id of the call, where its error envelope has one.
    """

    def __init__(self, message: str, *, status: int, request_id: str | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.status = status
        self.request_id = request_id


class RequestRefused(StatusError):
    """The service refuses this very request; it will refuse it again. Not billed."""


class AuthenticationFailed(StatusError):
    """401: the API key is missing or wrong. Not billed."""

    fatal = True


class AccessRefused(StatusError):
    """403: the account may not do this. Not billed."""


class OutOfCredits(AccessRefused):
    """The account's balance does not cover the call. Not billed."""

    fatal = True


class NotFound(StatusError):
    """404: base_url or model is wrong, or the model was withdrawn. Not billed."""


class RateLimited(StatusError):
    """429 until the time for waiting was over. Not billed. The client has waited already: not repeated."""


class ServerFailed(StatusError):
    """5xx: the service failed. Failed requests are not charged, says the service."""

    retryable = True


class ServiceBusy(ServerFailed):
    """503: overloaded or under maintenance. Not billed."""


class GenerationTimedOut(ServerFailed):
    """The gateway gave up waiting or lost the service; the generation behind it may have been paid.

    504, 408, and 520 to 527, in which a content network says as much.
    """

    billed = Billed.UNKNOWN


class DownloadError(FluxError):
    """A picture that was paid for could not be brought into our custody. Its generation stays cached."""

    billed = Billed.YES


class ImageGone(DownloadError):
    """The picture's URL is dead, or its inline bytes are no longer in the spool."""


class DownloadInterrupted(DownloadError):
    """The download was cut, stalled, or refused for now."""

    retryable = True


class NotAnImage(DownloadError):
    """The bytes are not a picture, or they do not decode: a page of HTML, a broken file."""

    retryable = True


class UnexpectedFormat(DownloadError):
    """A whole picture, in another file format than the request asked for."""


class ImageTooLarge(DownloadError):
    """More bytes or pixels than allowed."""


class ImageUnwritable(DownloadError):
    """The disk did not take the picture. It would not take the next one either, so a batch stops paying."""

    fatal = True


class UnsafeURL(DownloadError):
    """The URL leads where no picture may be fetched from: not https, or into a private network."""


class ContentFlagged(FluxError):
    """The service flagged the picture as unsafe or delivered it blacked out. Paid, cached, never published."""

    billed = Billed.YES
