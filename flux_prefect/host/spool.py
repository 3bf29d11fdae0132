"""The spool: records of paid calls, generations and images in a local folder.

spool/
  calls/       one small file for each paid call without a known end; usually empty
  answers/     the body of each success, until its generation is recorded
  records/     one JSON record a generation, written before it is returned to the caller
  ledgers/     what is known of each paid call of a flow run, over all its attempts
  endpoints/   prices and pace of each endpoint, as the last batch found them
  pictures/    the images as delivered, named by the fingerprint (the folder's name outlives a release)
  published/   one small record a published image; `retention` removes what they name after some time
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from flux_prefect import errors
from flux_prefect.api.answers import RawAnswer, read_answer
from flux_prefect.api.client import MAX_PIXELS
from flux_prefect.api.downloads import REJECTED, DownloadedImage
from flux_prefect.api.images import ExpectedShape, inspect_image
from flux_prefect.api.models import Generation, ImageRequest, normalize_endpoint
from flux_prefect.errors import (
    Billed,
    ContentFlagged,
    DownloadError,
    FluxError,
    ServiceError,
    SpoolUnreadable,
    SpoolUnwritable,
    UnexpectedSize,
)
from flux_prefect.local_files import explain_os_error, open_part, part_path, remove_abandoned
from flux_prefect.settings import current_settings

_LONGEST_VERDICT = 64 * 1024  # bytes

__all__ = ["Experience", "ImageFile", "KeptAnswer", "PaidCall", "PublishedFile", "Spool", "black_image"]


class PaidCall(BaseModel):
    """A paid call on its way: written before it is sent, removed once its end is known."""

    model_config = ConfigDict(frozen=True)

    client_request_id: str = Field(description="Our id of the call, as the service's log shows it.")
    fingerprint: str = Field(description="What was asked for. `unseeded` for a request without a seed.")
    endpoint: str = Field(description="The root URL of the service.")
    sent_at: datetime = Field(description="When the call was sent, UTC.")
    task_run_id: str | None = Field(description="The Prefect task run that sent it.")
    sends: int = Field(default=1, description="How often it was sent. Each time but the last, the service refused it.")
    billed: Billed = Field(default=Billed.UNKNOWN, description="What is known of its cost.")
    credits_used: float | None = Field(default=None, description="What it cost, in credits. None: unknown.")
    error: str | None = Field(
        default=None, description="How its answer was lost. None: still in flight, or its process died."
    )


class KeptAnswer(BaseModel):
    """A paid answer that is not parsed yet, with everything that parsing it needs."""

    model_config = ConfigDict(frozen=True)

    call: PaidCall = Field(description="The call that it answers.")
    request: ImageRequest = Field(description="What was asked for.")
    answer: RawAnswer = Field(description="The answer as it came.")
    replaces: str | None = Field(default=None, description="The call whose dead answer it replaces, if any.")
    shared_as: str | None = Field(default=None, description="The object in a bucket by which other hosts find it.")

    def read(self) -> Generation:
        """Parse the answer.

        Raises:
            InvalidResponse, EmptyGeneration: this release can't read it.
        """
        generation = read_answer(
            self.answer,
            request=self.request,
            endpoint=self.call.endpoint,
            client_request_id=self.call.client_request_id,
        )
        return generation.model_copy(update={"replaces": self.replaces, "shared_as": self.shared_as})


class ImageFile(DownloadedImage):
    """One image in the spool: a whole, checked file and its generation."""

    index: int = Field(ge=0, description="The image's place in its generation.")
    generation: Generation = Field(description="The paid answer that it belongs to.")

    def is_whole(self) -> bool:
        """Whether the file is still there with its size. The bytes themselves are checked by S3 on upload."""
        try:
            return self.path.stat().st_size == self.size
        except OSError:
            return False


class PublishedFile(DownloadedImage):
    """The file of a published image, which may have left the spool."""

    published: dict[str, JsonValue] = Field(description="The `PublishedImage`: where its bytes are.")


class Experience(BaseModel):
    """What this host learnt about an endpoint in its last batch: the starting values of the next one."""

    model_config = ConfigDict(frozen=True)

    prices: dict[str, float] = Field(default_factory=dict, description="Credits that an image cost, by model.")
    seconds: float | None = Field(default=None, description="How long a generation took, all its steps together.")
    in_flight: int | None = Field(default=None, description="The in-flight limit at which the pacing settled.")


class Spool:
    """The folder in which this host keeps what was paid for.

    Every write is atomic: a crash leaves the old file or the new one. Records of answers outlive a power cut as well;
    one that comes while such a record is written leaves the call noted as perhaps paid for.
    Nothing secret is in it: no key, no header.

    Example:
        ```python
        for call in Spool().open_calls():
            print(call.client_request_id, call.sent_at)
        ```
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or current_settings().spool).expanduser().absolute()

    def prepare(self) -> None:
        """Make the folders and verify that they can be written.

        Raises:
            SpoolUnwritable: with the folder, the reason and the setting to change.
        """
        try:
            for name in ("calls", "answers", "records", "endpoints", "pictures", "published"):
                (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            proof = part_path(self.root / "write-check")
            try:
                proof.write_bytes(b"x")
            finally:
                proof.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def sweep(self) -> None:
        """Remove the half-written files of dead processes, on whatever host or in whatever container they were.

        For the start of a run; never raises.
        """
        with suppress(OSError):
            for part in self.root.rglob("*.part"):
                remove_abandoned(part)

    # Paid calls

    def open_call(self, call: PaidCall) -> None:
        """Note a call before it is sent.

        Raises:
            SpoolUnwritable: so the call must not be sent.
        """
        try:
            _write(self._call_path(call.fingerprint, call.client_request_id), call.model_dump_json())
        except OSError as error:
            raise self._unwritable(error) from error

    def leave_open(self, call: PaidCall, error: ServiceError) -> None:
        """Note how a call that was paid for, or may have been, lost its answer."""
        lost = call.model_copy(
            update={"billed": error.billed, "credits_used": error.credits_used, "error": error.message}
        )
        with suppress(OSError):  # the note from before the call still stands
            _write(self._call_path(call.fingerprint, call.client_request_id), lost.model_dump_json())

    def close_call(self, call: PaidCall) -> None:
        """Forget a call whose end is known."""
        with suppress(OSError):  # a note too many overstates what may have been paid; an error here would hide the end
            self._call_path(call.fingerprint, call.client_request_id).unlink()

    def open_calls(self, fingerprint: str | None = None) -> list[PaidCall]:
        """The calls without a known end, of one request or of all.

        Raises:
            SpoolUnreadable: there may be some, but the folder or a note can't be read.
        """
        calls = []
        for path in _list(self.root / "calls", "" if fingerprint is None else f"{fingerprint}."):
            note = _read(path)
            with suppress(ValidationError):  # a broken note, or one whose call has ended meanwhile
                calls.append(PaidCall.model_validate_json(note or b""))
        return calls

    # Answers

    def keep_answer(self, kept: KeptAnswer) -> Path:
        """Keep a paid answer before it is parsed. It outlives a kill of the process.

        Raises:
            OSError: the disk does not take it.
        """
        path = self._answer_path(kept.call.fingerprint, kept.call.client_request_id)
        _write(path, kept.model_dump_json())
        return path

    def drop_answer(self, fingerprint: str, client_request_id: str) -> None:
        """Remove an answer whose generation is recorded."""
        with suppress(OSError):
            self._answer_path(fingerprint, client_request_id).unlink()

    def kept_answers(self, fingerprint: str) -> list[KeptAnswer]:
        """The answers of one request that were kept and not recorded, the oldest first.

        Raises:
            SpoolUnreadable: there may be some, but the folder or an answer can't be read.
        """
        kept = []
        for path in _list(self.root / "answers", f"{fingerprint}."):
            answer = _read(path)
            with suppress(ValidationError):  # a broken answer, or one that was recorded meanwhile
                kept.append(KeptAnswer.model_validate_json(answer or b""))
        return sorted(kept, key=lambda answer: answer.answer.received_at)

    def answer_path(self, call: PaidCall) -> Path:
        """Where the answer to a call is kept until its generation is recorded."""
        return self._answer_path(call.fingerprint, call.client_request_id)

    # Generations

    def keep_generation(self, generation: Generation) -> None:
        """Keep the record of a paid answer, inline bytes with it, replacing an older one of the same request.

        The images of an older answer go with its record: they would pass for those of the new one.

        Takes milliseconds: it waits for the disk.
        """
        try:
            older = self.find_generation(generation.fingerprint)
        except SpoolUnreadable:
            older = None
        if older is not None and older.client_request_id != generation.client_request_id:
            for folder in ("published", "pictures"):  # in this order: what has no record of its publication stays
                for file in (self.root / folder).glob(f"{generation.fingerprint}-*"):
                    file.unlink(missing_ok=True)
        _write(self._record_path(generation.fingerprint), generation.model_dump_json(), os.fsync)

    def settle_replacement(self, generation: Generation) -> None:
        """Record that an answer which replaced a dead one was fetched. A failure to record it is ignored."""
        with suppress(OSError, SpoolUnreadable):
            kept = self.find_generation(generation.fingerprint)
            if kept is not None and kept.client_request_id == generation.client_request_id:
                self.keep_generation(kept.model_copy(update={"replaces": None}))

    def find_generation(self, fingerprint: str) -> Generation | None:
        """The record of a paid answer; None if there is none, or only a broken one.

        Raises:
            SpoolUnreadable: there may be one, but too many files are open, or it belongs to another user.
        """
        record = _read(self._record_path(fingerprint))
        try:
            return None if record is None else Generation.model_validate_json(record)
        except ValidationError:
            return None

    def drop_inline(self, fingerprint: str, index: int) -> None:
        """Remove the bytes of a published image from the record of its answer, if they came inside it."""
        kept = self.find_generation(fingerprint)
        if kept is not None and any((image.url or "").startswith("data:") for image in kept.images):
            images = tuple(
                image.model_copy(update={"url": None}) if image.index == index else image for image in kept.images
            )
            self.keep_generation(kept.model_copy(update={"images": images}))

    def forget_generation(self, fingerprint: str) -> None:
        """Remove the record of an answer whose images are published."""
        self._record_path(fingerprint).unlink(missing_ok=True)

    # Experience

    def keep_experience(self, endpoint: str, experience: Experience) -> None:
        """Keep what was learnt about an endpoint. Ignores a full disk: it is learnt anew."""
        with suppress(OSError):
            _write(self._experience_path(endpoint), experience.model_dump_json())

    def find_experience(self, endpoint: str) -> Experience:
        """What was learnt about an endpoint; an empty record if nothing was, or if it can't be read."""
        try:
            return Experience.model_validate_json(self._experience_path(endpoint).read_bytes())
        except (OSError, ValidationError):
            return Experience()

    # Images

    def keep_image(self, generation: Generation, index: int, content: bytes) -> None:
        """Put the bytes of an image in their place.

        Raises:
            SpoolUnwritable: the disk does not take them.
        """
        try:
            _write(self.image_path(generation, index), content)
        except OSError as error:
            raise self._unwritable(error) from error

    def image_path(self, generation: Generation, index: int) -> Path:
        """Where the bytes of one image belong."""
        return self.root / "pictures" / f"{generation.fingerprint}-{index}.{generation.request.extension}"

    def rejected_path(self, generation: Generation, index: int) -> Path:
        """Where an image is kept that the service delivers and that must not be published."""
        path = self.image_path(generation, index)
        return path.with_name(f"{path.name}{REJECTED}")

    def find_image(
        self, generation: Generation, index: int, shape: ExpectedShape | None = None
    ) -> DownloadedImage | None:
        """Inspect the image's file anew; None if it is missing or broken. Reads and decodes it: call it in a thread.

        Raises:
            UnexpectedSize: it has another shape, and is kept as rejected from now on.
        """
        path = self.image_path(generation, index)
        with suppress(OSError):
            os.utime(self._published_path(generation, index))  # it is in use, so it does not leave
        try:
            image = inspect_image(path, generation.request.output_format, max_pixels=MAX_PIXELS, shape=shape)
        except UnexpectedSize:
            self.reject(generation, index)
            return self.reconsider(generation, index, shape)
        except (OSError, DownloadError):
            return None
        return DownloadedImage(**image.model_dump(), path=path)

    def reject(self, generation: Generation, index: int) -> None:
        """Keep an image as rejected, so that it is neither published nor fetched again."""
        with suppress(OSError):  # it is refused at the next look again
            self.image_path(generation, index).replace(self.rejected_path(generation, index))

    def reconsider(self, generation: Generation, index: int, shape: ExpectedShape | None) -> DownloadedImage | None:
        """Inspect a rejected image anew, and take it back if this release accepts it. None if it is gone.

        Reads and decodes it: call it in a thread.

        Raises:
            DownloadError: it is still not what was asked for, with the reason.
            SpoolUnreadable: it can't be read.
        """
        path = self.rejected_path(generation, index)
        verdict = _read_verdict(path)
        if verdict is not None:
            raise verdict
        try:
            image = inspect_image(path, generation.request.output_format, max_pixels=MAX_PIXELS, shape=shape)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error) from error
        except DownloadError as error:
            raise type(error)(
                f"{error.message} So the service delivers it. It was paid for, so it is kept as {path}; it is not "
                "published. Remove that file to fetch it again.",
                retryable=False,
            ) from error
        if not image.black:
            path = path.replace(self.image_path(generation, index))
        return DownloadedImage(**image.model_dump(), path=path)

    def replace_by_verdict(self, generation: Generation, index: int, error: FluxError) -> None:
        """Keep what is wrong with a rejected image instead of its bytes: `reconsider` raises it.

        Raises:
            OSError: the disk does not take it.
        """
        verdict = {"verdict": type(error).__name__, "message": error.message}
        _write(self.rejected_path(generation, index), json.dumps(verdict))

    # Published images

    def note_published(self, image: ImageFile, published: dict[str, JsonValue]) -> None:
        """Record where an image is published, so that it may leave. A failure to record it is ignored: it stays."""
        if image.path == self.image_path(image.generation, image.index):
            known = image.model_dump(include=set(DownloadedImage.model_fields))
            note = PublishedFile(**known, published=published)
            with suppress(OSError):
                _write(self._published_path(image.generation, image.index), note.model_dump_json())

    def forget_published(self, generation: Generation, index: int) -> None:
        """Forget that an image is published, as it was fetched anew."""
        self._published_path(generation, index).unlink(missing_ok=True)

    def find_published(self, generation: Generation, index: int) -> PublishedFile | None:
        """The record of a published image, whose file may have left; None if there is none. Counts as a use of it."""
        path = self._published_path(generation, index)
        try:
            note = PublishedFile.model_validate_json(path.read_bytes())
            os.utime(path)
        except (OSError, ValidationError):
            return None
        return note

    def _published_path(self, generation: Generation, index: int) -> Path:
        return self.root / "published" / f"{generation.fingerprint}-{index}.json"

    def _unwritable(self, error: OSError) -> SpoolUnwritable:
        return SpoolUnwritable(
            f"The spool {self.root} can't be written "
            f"{explain_os_error(error, 'set FLUX_PREFECT_SPOOL to a folder with room for the images')}, then run again."
        )

    def _call_path(self, fingerprint: str, client_request_id: str) -> Path:
        return self.root / "calls" / f"{fingerprint}.{client_request_id}.json"

    def _answer_path(self, fingerprint: str, client_request_id: str) -> Path:
        return self.root / "answers" / f"{fingerprint}.{client_request_id}.json"

    def _experience_path(self, endpoint: str) -> Path:
        return (
            self.root / "endpoints" / f"{hashlib.sha256(normalize_endpoint(endpoint).encode()).hexdigest()[:32]}.json"
        )

    def _record_path(self, fingerprint: str) -> Path:
        return self.root / "records" / f"{fingerprint}.json"


def black_image(generation: Generation, index: int) -> ContentFlagged:
    """The error of an image that is black all over."""
    return ContentFlagged(
        f"Image {index} of {generation.request.label!r} is black all over, which is how the service hides an unsafe "
        "one. It was paid for and is not published. Change the prompt or the seed."
    )


def _read_verdict(path: Path) -> FluxError | None:
    """What is wrong with a rejected image whose bytes have left; None for one that is there, or gone."""
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_VERDICT)
        verdict = json.loads(content) if content.startswith(b'{"verdict"') else {}
        kind = getattr(errors, verdict["verdict"])
        return kind(verdict["message"], retryable=False) if issubclass(kind, FluxError) else None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


def _list(folder: Path, start: str) -> list[Path]:
    """The JSON files of a folder whose names begin so, in order. Raises as `_read`."""
    try:
        with os.scandir(folder) as files:
            names = [file.name for file in files if file.name.startswith(start) and file.name.endswith(".json")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    return [folder / name for name in sorted(names)]


def _read(path: Path) -> bytes | None:
    """The content of a file that may hold what was paid for; None if there is none.

    Raises:
        SpoolUnreadable: there may be one, but it can't be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> SpoolUnreadable:
    return SpoolUnreadable(
        f"{path} can't be read {explain_os_error(error, 'make it readable for this user')}, then run again. "
        "It may hold what was paid for, so nothing was sent."
    )


def _write(path: Path, content: str | bytes, settle: Callable[[int], None] | None = None) -> None:
    part = part_path(path)
    try:
        with _open_new(part) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            part.replace(path)  # a kill from here on has the whole file; a power cut not before it is settled
            if settle is not None:
                settle(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if settle is not None:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            settle(folder)  # the file's name outlives a power cut only with its folder
        finally:
            os.close(folder)


def _open_new(path: Path) -> BinaryIO:
    try:
        return open_part(path)
    except FileNotFoundError:  # the first file of its kind; or the folder was removed
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return open_part(path)
