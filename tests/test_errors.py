from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from flux_prefect import errors
from flux_prefect.errors import (
    AuditFailed,
    BackfillFailed,
    BatchFailed,
    Billed,
    DownloadError,
    FluxError,
    ServiceError,
    StatusError,
    TemplateFailed,
)

ALL = sorted(
    (kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, FluxError)),
    key=lambda kind: kind.__name__,
)
UNSURE = {"AnswerLost", "InvalidResponse", "EmptyGeneration", "GenerationTimedOut", "RepeatLimitReached"}


def _make(kind: type[FluxError]) -> FluxError:
    if issubclass(kind, TemplateFailed):
        return kind(["row 1: no name"], 1)
    if issubclass(kind, (BatchFailed, BackfillFailed, AuditFailed)):
        return kind("what happened", report={"rows": 1})  # type: ignore[arg-type]  # any picklable report does
    kwargs: dict[str, object] = {"retry_after": 2.5, "billed": Billed.YES, "retryable": True}
    if issubclass(kind, ServiceError):
        kwargs["client_request_id"] = "fp-1"
    if issubclass(kind, StatusError):
        kwargs |= {"status": 418, "request_id": "r-1"}
    return kind("what happened", **kwargs)  # type: ignore[arg-type]  # one call for every class


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_pickling_with_all_it_knows(kind: type[FluxError]) -> None:
    """Prefect persists a failed run's error: class, message and every attribute come back."""
    error = _make(kind)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own bytes
        assert type(twin) is kind
        assert twin.message == error.message
        assert vars(twin) == vars(error)


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    """Each class stands in the drawing under its base class, and nothing else does."""
    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        above = [(other, parent) for other, parent in above if other < depth]
        drawn[name] = above[-1][1] if above else "Exception"
        above.append((depth, name))
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in ALL if kind.__base__}


@pytest.mark.parametrize("kind", ALL)
def test_every_error_says_what_it_means_for_money(kind: type[FluxError]) -> None:
    """A lost answer is possibly billed, an image that was generated is billed, everything else is not."""
    paid = issubclass(kind, DownloadError) or kind.__name__ == "ContentFlagged"
    expected = Billed.UNKNOWN if kind.__name__ in UNSURE else Billed.YES if paid else Billed.NO
    assert kind.billed is expected


def test_only_what_stops_every_call_is_fatal() -> None:
    """A batch stops sending for these errors and for no other."""
    assert {kind.__name__ for kind in ALL if kind.fatal} == {
        "AuthenticationFailed",
        "BalanceTooLow",
        "BucketAccessDenied",
        "BucketMissing",
        "ChecksumsRefused",
        "ConditionsIgnored",
        "ImageUnwritable",
        "LocksUnusable",
        "ManifestUnwritable",
        "OutOfCredits",
        "ResultStoreUnreadable",
        "RunStopped",
        "ShardSuperseded",
        "SpoolUnwritable",
    }
