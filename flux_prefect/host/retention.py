"""What leaves the spool, and when: it must not grow with every image that was ever published.

| what | leaves |
|---|---|
| the file of a published image | `keep_published_hours` after its publication and its last use |
| the record of a published image and of its answer | `keep_records_days` after that |
| the file of an image that the service delivers wrong or black | after `keep_records_days`; the reason stays |
| open calls, answers whose images are not all published | never |
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from flux_prefect.api.downloads import REJECTED, SUSPECT
from flux_prefect.api.images import ExpectedShape
from flux_prefect.api.models import Generation
from flux_prefect.errors import ContentFlagged, DownloadError, FluxError, SpoolUnreadable
from flux_prefect.host.locks import HostLockManager
from flux_prefect.host.spool import Spool, black_image
from flux_prefect.settings import current_settings

__all__ = ["shrink", "shrink_at_times"]

_HOUR, _DAY = 3600.0, 24 * 3600.0
_MOST_AT_ONCE = 1000
"""Images that one sweep in the middle of a run removes, at about a millisecond each. At its start there is no limit."""

_NAME = re.compile(r"([0-9a-f]{32})-(\d+)\.")


def shrink_at_times(spool: Spool, locks: HostLockManager) -> None:
    """Shrink the spool by some images, if no process has done so in the last hour. Never raises."""
    stamp = spool.root / "swept"
    try:
        if time.time() - stamp.stat().st_mtime < _HOUR:
            return
    except FileNotFoundError:
        pass
    except OSError:
        return
    shrink(spool, locks, most=_MOST_AT_ONCE)


def shrink(spool: Spool, locks: HostLockManager, *, most: int | None = None) -> None:
    """Remove what may leave the spool. Call it in a thread. Never raises.

    What another process is working on stays: it has the lock of its request, or has just used the file. So does what
    is not certain to be published. One process sweeps at a time.

    Args:
        spool: The spool.
        locks: The locks of those who work with it.
        most: Files to remove, at most.
    """
    with suppress(OSError, FluxError), _held(locks, f"sweep-{spool.root.resolve()}") as is_alone:
        if is_alone:
            (spool.root / "swept").touch()
            _Sweep(spool, locks, most).run()


class _Sweep:
    def __init__(self, spool: Spool, locks: HostLockManager, most: int | None) -> None:
        settings = current_settings()
        now = time.time()
        self._spool = spool
        self._locks = locks
        self._left = float("inf") if most is None else most
        self._files_before = now - settings.keep_published_hours * _HOUR
        self._records_before = now - settings.keep_records_days * _DAY

    def run(self) -> None:
        self._remove_published()
        self._remove_wrong()

    def _remove_published(self) -> None:
        images: dict[str, list[str]] = {}
        for path, fingerprint, _ in self._files("pictures", ""):
            images.setdefault(fingerprint, []).append(path.name)
        notes: dict[str, list[Path]] = {}
        for note, fingerprint, index in self._files("published", ".json"):
            notes.setdefault(fingerprint, []).append(note)
            if _is_older(note, self._files_before):
                self._remove_file(note, fingerprint, index, images.get(fingerprint, []))
        for fingerprint, its_notes in notes.items():
            if all(_is_older(note, self._records_before) for note in its_notes):
                self._remove_record(fingerprint, its_notes, images.get(fingerprint, []))

    def _remove_wrong(self) -> None:
        for wrong, fingerprint, index in self._files("pictures", REJECTED):
            if _is_older(wrong, self._records_before):
                self._replace_by_verdict(wrong, fingerprint, index)
        for wrong, fingerprint, _ in self._files("pictures", SUSPECT):
            if _is_older(wrong, self._records_before):
                with self._alone_with(fingerprint) as is_alone:
                    if is_alone:
                        wrong.unlink(missing_ok=True)

    def _remove_file(self, note: Path, fingerprint: str, index: int, images: list[str]) -> None:
        # Not what is rejected, or still being written: those names go on after the extension.
        names = [name for name in images if name.startswith(f"{fingerprint}-{index}.") and name.count(".") == 1]
        found = [path for path in self._in_images(names) if _is_older(path, self._files_before)]
        if not found:
            return
        with self._alone_with(fingerprint) as is_alone:
            # Again, as its last user may have gone a moment ago.
            if is_alone and _is_older(note, self._files_before):
                for path in found:
                    path.unlink(missing_ok=True)
                self._spool.drop_inline(fingerprint, index)

    def _remove_record(self, fingerprint: str, notes: list[Path], images: list[str]) -> None:
        if any(path.exists() for path in self._in_images(images)):
            return
        with self._alone_with(fingerprint) as is_alone:
            if not is_alone or not all(_is_older(note, self._records_before) for note in notes):
                return
            generation = self._generation(fingerprint)
            if generation is not None and len(notes) < generation.request.num_images:
                return  # an image that is not published, or that must not be
            self._spool.forget_generation(fingerprint)
            for note in notes:
                note.unlink(missing_ok=True)

    def _in_images(self, names: list[str]) -> list[Path]:
        return [self._spool.root / "pictures" / name for name in names]

    def _replace_by_verdict(self, wrong: Path, fingerprint: str, index: int) -> None:
        with self._alone_with(fingerprint) as is_alone:
            generation = self._generation(fingerprint)
            if not is_alone or generation is None:
                return
            image = next((image for image in generation.images if image.index == index), None)
            shape = None if image is None else ExpectedShape.of(generation.request, image)
            if wrong != self._spool.rejected_path(generation, index):
                return
            try:
                found = self._spool.reconsider(generation, index, shape)
            except (DownloadError, ContentFlagged) as error:
                self._spool.replace_by_verdict(generation, index, error)
            else:
                if found is not None and found.black:
                    self._spool.replace_by_verdict(generation, index, black_image(generation, index))

    def _generation(self, fingerprint: str) -> Generation | None:
        try:
            return self._spool.find_generation(fingerprint)
        except SpoolUnreadable:
            return None

    def _files(self, folder: str, end: str) -> Iterator[tuple[Path, str, int]]:
        with suppress(FileNotFoundError), os.scandir(self._spool.root / folder) as files:
            for file in files:
                name = _NAME.match(file.name)
                if name is not None and file.name.endswith(end):
                    yield Path(file.path), name[1], int(name[2])

    @contextmanager
    def _alone_with(self, fingerprint: str) -> Iterator[bool]:
        """Whether nobody works on a request, nor can before the end of the block. False at the limit as well."""
        if self._left <= 0:
            yield False
            return
        self._left -= 1
        with (
            _held(self._locks, f"produce-{fingerprint}") as first,
            _held(self._locks, f"generate-{fingerprint}") as second,
        ):
            yield first and second


@contextmanager
def _held(locks: HostLockManager, key: str) -> Iterator[bool]:
    holder = uuid4().hex
    try:
        yield locks.acquire_lock(key, holder, acquire_timeout=0)
    finally:
        locks.release_lock(key, holder)


def _is_older(path: Path, moment: float) -> bool:
    """Whether a file was written, and marked as used, before a moment. One that is gone is not."""
    try:
        return path.stat().st_mtime <= moment
    except OSError:
        return False
