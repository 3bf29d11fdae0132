"""Every error of the package, as one tree.

    FluxError                           retryable, retry_after, billed, fatal
    ├── ServiceError                    a call to the image service
    │   ├── NotSent                     no connection: nothing was sent
    │   ├── AnswerLost                  sent, without a complete response: possibly billed
    │   ├── InvalidResponse             a 2xx response that the API does not describe
    │   ├── EmptyGeneration             a 2xx response without the requested image
    │   ├── RepeatLimitReached          answers to this request were lost too often to send it again
    │   └── StatusError                 a response with an error status
    │       ├── RequestRefused          400, 413, 422 and any other 4xx: the request itself
    │       ├── AuthenticationFailed    401
    │       ├── AccessRefused           403
    │       │   └── OutOfCredits        403 or 402 that says so
    │       ├── NotFound                404: path or model
    │       ├── RateLimited             429, until the pacing time-out
    │       └── ServerFailed            500, 502, ...
    │           ├── ServiceBusy         503
    │           └── GenerationTimedOut  408, 504, 520 to 527: possibly billed
    ├── DownloadError                   fetching an image that was paid for
    │   ├── ImageGone                   its URL is dead
    │   ├── DownloadRefused             refused although the URL is young: by a proxy, a firewall, a region
    │   │   └── DownloadEncoded         compressed on the way, so not read
    │   ├── DownloadInterrupted         cut off, stalled or temporarily refused
    │   ├── NotAnImage                  the bytes are not an image
    │   │   └── BrokenImage             they start as an image and do not decode to its end
    │   ├── UnexpectedFormat            a valid image in another format than requested
    │   ├── UnexpectedSize              a valid image in another shape than requested, such as a placeholder
    │   ├── ImageTooLarge               over the cap in bytes or pixels
    │   ├── ImageUnwritable             the disk can't store it
    │   └── UnsafeURL                   a URL that must not be fetched
    ├── ContentFlagged                  the service blanked or flagged the image
    ├── BucketError                     an operation on the bucket failed
    │   ├── BucketMissing               it does not exist at this endpoint
    │   ├── BucketAccessDenied          the keys are wrong, missing, or don't allow this
    │   ├── BucketUnavailable           the server can't be reached, or is temporarily overloaded
    │   ├── ImageChanged                the file no longer has the bytes that were checked
    │   ├── KeyOccupied                 another object is stored under an image's key
    │   ├── ConditionsIgnored           the server does not honour conditional writes
    │   └── ChecksumsRefused            the server accepts no checksum headers
    ├── LeaseLost                       another machine may hold the lease by now
    ├── LocksUnusable                   a folder of lock files can't be used
    ├── SpoolUnwritable                 the spool folder can't be written
    ├── SpoolUnreadable                 a record of the spool can't be read now
    ├── ResultStoreUnreadable           Prefect's result storage can't be read
    ├── ManifestUnwritable              the manifest's local file can't be written
    ├── InvalidSettings                 an environment variable has an unusable value
    ├── TableError                      the table as a whole can't be read
    │   ├── TemplateFailed              rows of a template table can't be rendered
    │   └── TooFewRows                  it has fewer rows than min_rows, as after a failed export
    ├── TooManyCombinations             a sweep multiplies to more images than allowed
    ├── ModelWithdrawn                  the service no longer serves a model of the table
    ├── BalanceTooLow                   the balance does not cover the plan's highest cost
    ├── BudgetExhausted                 the call's cost would exceed the cap
    ├── RunStopped                      the run was cancelled before the call went out
    ├── RepairImpossible                an audit can't restore an image
    ├── BatchFailed                     more items failed than the batch tolerates
    ├── BackfillFailed                  some days of a backfill failed
    ├── AuditFailed                     the bucket's images differ from the manifest
    ├── ShardLost                       a shard's runs were lost, or failed for good
    ├── ShardSuperseded                 another run has taken over the shard
    └── UnexpectedError                 any other exception

Every error can be pickled: Prefect persists it with the run's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_prefect.batch.days import BackfillReport
    from flux_prefect.manifest.audit import AuditReport
    from flux_prefect.manifest.report import BatchReport

__all__ = [
    "AccessRefused",
    "AnswerLost",
    "AuditFailed",
    "AuthenticationFailed",
    "BackfillFailed",
    "BalanceTooLow",
    "BatchFailed",
    "Billed",
    "BrokenImage",
    "BucketAccessDenied",
    "BucketError",
    "BucketMissing",
    "BucketUnavailable",
    "BudgetExhausted",
    "ChecksumsRefused",
    "ConditionsIgnored",
    "ContentFlagged",
    "DownloadEncoded",
    "DownloadError",
    "DownloadInterrupted",
    "DownloadRefused",
    "EmptyGeneration",
    "FluxError",
    "GenerationTimedOut",
    "ImageChanged",
    "ImageGone",
    "ImageTooLarge",
    "ImageUnwritable",
    "InvalidResponse",
    "InvalidSettings",
    "KeyOccupied",
    "LeaseLost",
    "LocksUnusable",
    "ManifestUnwritable",
    "ModelWithdrawn",
    "NotAnImage",
    "NotFound",
    "NotSent",
    "OutOfCredits",
    "RateLimited",
    "RepairImpossible",
    "RepeatLimitReached",
    "RequestRefused",
    "ResultStoreUnreadable",
    "RunStopped",
    "ServerFailed",
    "ServiceBusy",
    "ServiceError",
    "ShardLost",
    "ShardSuperseded",
    "SpoolUnreadable",
    "SpoolUnwritable",
    "StatusError",
    "TableError",
    "TemplateFailed",
    "TooFewRows",
    "TooManyCombinations",
    "UnexpectedError",
    "UnexpectedFormat",
    "UnexpectedSize",
    "UnsafeURL",
]


class Billed(str, Enum):
    """Whether a failed call was billed."""

    NO = "not billed"
    YES = "billed"
    UNKNOWN = "possibly billed"


class FluxError(Exception):
    """The root of the tree.

    Attributes:
        retryable: Repeating the same step later can help.
        retry_after: Delay requested by the server, in seconds, or None.
        billed: Whether the call that failed was paid for.
        fatal: Whether the next item would fail for the same reason. A batch then stops sending.

    Example:
        ```python
        try:
            await generate_image(request, credentials)
        except FluxError as error:
            print(error.billed.value, error.retryable, error.message)
        ```
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
        # By default exceptions are rebuilt from args alone, which would lose the other attributes.
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(cls: type[FluxError], args: tuple[Any, ...]) -> FluxError:
    error = cls.__new__(cls)
    error.args = args
    return error


# The image service


class ServiceError(FluxError):
    """A call to the image service that returned no generation.

    Attributes:
        client_request_id: This package's id of the call, as in the service's log.
        credits_used: Cost of the call in credits, or None if the service reported none.
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
    """No connection could be made or the request could not be written. Not billed."""

    retryable = True


class AnswerLost(ServiceError):
    """The request was sent, and no complete response came back. Possibly billed."""

    retryable = True
    billed = Billed.UNKNOWN


class InvalidResponse(ServiceError):
    """A success status with a body that the API does not describe. Possibly billed."""

    retryable = True
    billed = Billed.UNKNOWN


class EmptyGeneration(ServiceError):
    """A success status without the requested image. `billed` follows the credits in the response."""

    retryable = True
    billed = Billed.UNKNOWN


class RepeatLimitReached(ServiceError):
    """Answers to this request were lost as often as `FLUX_PREFECT_REPEAT_UNKNOWN` allows. Nothing was sent.

    `billed` is that of the calls before: possibly billed.
    """

    billed = Billed.UNKNOWN


class StatusError(ServiceError):
    """A response with an error status.

    Attributes:
        status: The HTTP status.
        request_id: The service's id of the call, or None.
    """

    def __init__(self, message: str, *, status: int, request_id: str | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.status = status
        self.request_id = request_id


class RequestRefused(StatusError):
    """The service refused this request and will refuse it again. Not billed."""


class AuthenticationFailed(StatusError):
    """401: the API key is missing or wrong. Not billed."""

    fatal = True


class AccessRefused(StatusError):
    """403: the account is not allowed to do this. Not billed."""


class OutOfCredits(AccessRefused):
    """The account's balance does not cover the call. Not billed."""

    fatal = True


class NotFound(StatusError):
    """404: base_url or model is wrong, or the model was withdrawn. Not billed."""


class RateLimited(StatusError):
    """429 until the pacing time-out. Not billed. Not retried, as the client has already waited."""


class ServerFailed(StatusError):
    """5xx: the service failed. The service states that failed requests are not charged."""

    retryable = True


class ServiceBusy(ServerFailed):
    """503: overloaded or under maintenance. Not billed."""


class GenerationTimedOut(ServerFailed):
    """The gateway timed out or lost the service. The generation is possibly billed.

    504, 408, and the statuses 520 to 527 of a content network.
    """

    billed = Billed.UNKNOWN


# Downloads


class DownloadError(FluxError):
    """An image that was paid for could not be downloaded. Its generation stays cached."""

    billed = Billed.YES


class ImageGone(DownloadError):
    """The image's URL is dead, or its inline bytes are no longer in the spool."""


class DownloadRefused(DownloadError):
    """The host, or a proxy on the way, refused the image although its URL is young. Nothing is paid again for it."""


class DownloadInterrupted(DownloadError):
    """The download was cut off, stalled, or temporarily refused."""

    retryable = True


class DownloadEncoded(DownloadRefused):
    """The image came with a Content-Encoding although none was accepted. It was not read."""


class NotAnImage(DownloadError):
    """The bytes are not an image, as with a page of HTML."""

    retryable = True


class BrokenImage(NotAnImage):
    """The bytes start as an image and are not a complete one: cut, with a hole, or with zeros in it.

    Retryable until they come twice with the same digest: then they are what the service delivers.
    """


class UnexpectedFormat(DownloadError):
    """A complete image in another file format than requested."""


class UnexpectedSize(DownloadError):
    """A complete image in another shape than requested, as with a placeholder. Retryable as a `BrokenImage`."""

    retryable = True


class ImageTooLarge(DownloadError):
    """More bytes or pixels than allowed."""


class ImageUnwritable(DownloadError):
    """The disk could not store the image. It could not store the next one either, so a batch stops sending."""

    fatal = True


class UnsafeURL(DownloadError):
    """A URL that must not be fetched: not https, or in a private network."""


class ContentFlagged(FluxError):
    """The service flagged the image as unsafe or delivered it black. Paid for, cached, never published."""

    billed = Billed.YES


# S3


class BucketError(FluxError):
    """An operation on the bucket failed. Images in the spool stay there, so nothing is lost."""


class BucketMissing(BucketError):
    """The bucket does not exist at this endpoint."""

    fatal = True


class BucketAccessDenied(BucketError):
    """The keys are wrong or missing, or don't permit this operation."""

    fatal = True


class BucketUnavailable(BucketError):
    """The server can't be reached, or is temporarily overloaded."""

    retryable = True


class ImageChanged(BucketError):
    """The file in the spool is gone, or its bytes have changed since they were checked. S3 refuses those."""


class KeyOccupied(BucketError):
    """Another object is stored under the image's key."""


class ConditionsIgnored(BucketError):
    """The server ignores If-None-Match and If-Match, so its buckets can't hold leases or shared state."""

    fatal = True


class ChecksumsRefused(BucketError):
    """The server accepts no checksum headers. The message names the setting that leaves them out."""

    fatal = True


class LeaseLost(FluxError):
    """The call was not sent, as another machine may be generating the image. The next run picks it up."""


# This host


class LocksUnusable(FluxError):
    """A folder of lock files can't be used. Nothing was sent: without locks an image could be paid for twice."""

    fatal = True


class SpoolUnwritable(FluxError):
    """The spool folder can't be written. Detected before anything is sent, so nothing was paid."""

    fatal = True


class SpoolUnreadable(FluxError):
    """A record may exist but can't be read now. Its image is not paid for again meanwhile."""

    retryable = True


class ResultStoreUnreadable(FluxError):
    """Prefect's result storage can't be read, and may hold what was paid for. Nothing was sent."""

    fatal = True


class ManifestUnwritable(FluxError):
    """The manifest's local file can't be written. Earlier records are intact."""

    fatal = True


class InvalidSettings(FluxError, ValueError):
    """An environment variable has an invalid value. The message names the variable, the value and the allowed ones."""


# Tables and plans


class TableError(FluxError, ValueError):
    """The table as a whole can't be read. Nothing was sent."""


class TemplateFailed(TableError):
    """Rows of the table can't be read or rendered. Nothing was sent.

    Attributes:
        problems: The first rows with a problem, each with its number and what is wrong.
        count: Number of rows with a problem.
    """

    def __init__(self, problems: Sequence[str], count: int) -> None:
        more = f"\n… and {count - len(problems):,} more" if count > len(problems) else ""
        listed = "\n".join(problems)
        super().__init__(
            f"{count:,} rows can't be rendered; correct them and run again. Nothing was sent.\n{listed}{more}"
        )
        self.problems = tuple(problems)
        self.count = count


class TooFewRows(TableError):
    """The table has fewer rows than `min_rows`. Nothing was sent."""


class TooManyCombinations(FluxError, ValueError):
    """The lists of a sweep multiply to more images than allowed. Nothing was sent."""


class ModelWithdrawn(FluxError):
    """The service has withdrawn a model that the batch would pay for. The message names its replacement."""


class BalanceTooLow(FluxError):
    """The balance does not cover the plan's highest cost. Nothing was sent."""

    fatal = True


# Runs


class BudgetExhausted(FluxError):
    """The call was not sent, as its cost would exceed the cap. The next run picks it up."""


class RunStopped(FluxError):
    """The call was not sent, as the run was cancelled. The next run picks it up."""

    fatal = True


class RepairImpossible(FluxError):
    """An image can't be restored. The message has the reason."""


class BatchFailed(FluxError):
    """More items failed than the batch tolerates.

    Attributes:
        report: The complete report. Published images stay published.
    """

    def __init__(self, message: str, report: BatchReport) -> None:
        super().__init__(message)
        self.report = report


class BackfillFailed(FluxError):
    """Some days failed. The others are published.

    Attributes:
        report: The complete report.
    """

    def __init__(self, message: str, report: BackfillReport) -> None:
        super().__init__(message)
        self.report = report


class AuditFailed(FluxError):
    """The bucket's images differ from the manifest.

    Attributes:
        report: The complete report.
    """

    def __init__(self, message: str, report: AuditReport) -> None:
        super().__init__(message)
        self.report = report


class ShardLost(FluxError):
    """The shard's runs were lost repeatedly, or failed for a reason that would also fail the next run."""


class ShardSuperseded(FluxError):
    """Another run has taken over the shard."""

    fatal = True


class UnexpectedError(FluxError):
    """Any other exception. What was paid for before it stays in the spool."""
