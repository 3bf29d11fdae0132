"""Locks that end with their holder, for work that must happen once on a host."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
from filelock import FileLock, Timeout
from prefect.locking.protocol import LockManager

from flux_prefect.errors import LocksUnusable
from flux_prefect.local_files import explain_os_error
from flux_prefect.settings import current_settings

__all__ = ["HostLockManager"]

_logger = logging.getLogger(__name__)

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_FIRST_WAIT = 0.01
_LONGEST_WAIT = 0.25


class HostLockManager(LockManager):
    """A Prefect lock manager over kernel file locks.

    Guarantees: of all processes, threads and event loops that share a lock folder on one host, in whatever containers,
    one holds a key at a time. A holder that dies, even by `kill -9`, frees its locks at once; so does a manager that
    is garbage-collected. Waiting blocks no event loop in the async methods. Releasing a lock that is not held does
    nothing: Prefect's transactions release twice where one is nested in another.

    Costs about 0.4 ms a folder for a lock and its release. Waiters look again after 10 to 250 ms, in no order. A
    single look (`acquire_timeout=0`) can also fail while another process releases the lock or looks at it.

    Args:
        directory: Where the lock files are. Default: `FluxSettings.lock_folders`. It must not be on a network file
            system.

    Raises:
        LocksUnusable: a folder can't be used. Raised by every method that looks at a lock.

    Example:
        ```python
        async with HostLockManager().hold("catalogue"):
            ...  # one process of this host at a time
        ```
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        # By process as well: a forked child inherits this dictionary, but none of the locks.
        self._held: dict[tuple[int, str], tuple[str, list[FileLock]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, in this process or another, holds nothing: locks belong to the original's open files.
        return type(self), (self._directory,)

    def prepare(self) -> None:
        """Make the lock folders and verify that their file systems have locks.

        Logs a warning if the spool's has none: a run in another container or on another host that shares the spool is
        then not excluded.

        Raises:
            LocksUnusable: a folder can't be used; the message names the setting.
        """
        lockless: list[LocksUnusable] = []
        taken = self._take_all(f"prepare-{uuid4().hex}", lockless)
        _release_all(taken or ())
        for error in lockless:
            _logger.warning(
                "%s Until then this run is alone with its locks: runs in other containers or on other hosts that share "
                "the spool are not excluded, and can pay for the same image.",
                error.message,
            )

    def acquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,  # noqa: ARG002 - the kernel frees a dead holder's lock instead
    ) -> bool:
        """Take the lock, waiting at most `acquire_timeout` seconds (None: as long as it takes)."""
        wait = _Wait(lambda: self._try(key, holder), acquire_timeout)
        for pause in wait:
            time.sleep(pause)
        return wait.succeeded

    async def aacquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,  # noqa: ARG002 - the kernel frees a dead holder's lock instead
    ) -> bool:
        """Like `acquire_lock`, without blocking the event loop."""
        wait = _Wait(lambda: self._try(key, holder), acquire_timeout)
        for pause in wait:
            await anyio.sleep(pause)
        return wait.succeeded

    def release_lock(self, key: str, holder: str) -> None:
        """Free the lock if this holder has it; do nothing otherwise."""
        if not self.is_lock_holder(key, holder):
            return
        _, locks = self._held.pop(_here(key))
        _release_all(locks)

    def is_locked(self, key: str) -> bool:
        """Whether any process that shares a lock folder holds the lock now."""
        if _here(key) in self._held:
            return True
        name = _file_name(key)
        return any(_is_held(_prepared(folder) / name) for folder in self._folders())

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether this very holder has the lock."""
        held = self._held.get(_here(key))
        return held is not None and held[0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Wait until the lock is free. Return False after `timeout` seconds."""
        wait = _Wait(lambda: not self.is_locked(key), timeout)
        for pause in wait:
            time.sleep(pause)
        return wait.succeeded

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - Prefect's name
        """Like `wait_for_lock`, without blocking the event loop."""
        wait = _Wait(lambda: not self.is_locked(key), timeout)
        for pause in wait:
            await anyio.sleep(pause)
        return wait.succeeded

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the lock for the length of an `async with` block, waiting for it as long as it takes."""
        holder = uuid4().hex
        await self.aacquire_lock(key, holder)
        try:
            yield
        finally:
            self.release_lock(key, holder)

    def _try(self, key: str, holder: str) -> bool:
        held = self._held.get(_here(key))
        if held is not None:
            return held[0] == holder
        locks = self._take_all(key, [])
        if locks is None:
            return False
        self._held[_here(key)] = (holder, locks)
        return True

    def _take_all(self, key: str, lockless: list[LocksUnusable]) -> list[FileLock] | None:
        """Take the lock in every folder; None if it is held in one of them.

        A folder whose file system has no locks is skipped and added to `lockless`, unless there is no other.
        """
        taken: list[FileLock] = []
        name = _file_name(key)
        seen: set[tuple[int, int]] = set()
        try:
            for folder in self._folders():
                place = _place(_prepared(folder))
                if place in seen:  # by a link or a mount: it would wait for itself
                    continue
                seen.add(place)
                try:
                    lock = _take(folder / name)
                except LocksUnusable as error:
                    if not _has_no_locks(error):
                        raise
                    lockless.append(error)
                    continue
                if lock is None:
                    _release_all(taken)
                    return None
                taken.append(lock)
        except BaseException:
            _release_all(taken)
            raise
        if not taken:
            raise lockless[0]
        return taken

    def _folders(self) -> tuple[Path, ...]:
        return current_settings().lock_folders if self._directory is None else (self._directory,)


class _Wait:
    """Growing pauses between two looks at a condition, until it holds or the time-out is over."""

    def __init__(self, look: Callable[[], bool], timeout: float | None) -> None:
        self._look = look
        self._end = math.inf if timeout is None else time.monotonic() + timeout
        self.succeeded = False

    def __iter__(self) -> Iterator[float]:
        pause = _FIRST_WAIT
        while not self._look():
            left = self._end - time.monotonic()
            if left <= 0:
                return
            yield min(pause, left)
            pause = min(pause * 1.5, _LONGEST_WAIT)
        self.succeeded = True


def _here(key: str) -> tuple[int, str]:
    return os.getpid(), key


def _file_name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.lock"


def _take(path: Path) -> FileLock | None:
    lock = FileLock(
        path,
        thread_local=False,
        fallback_to_soft=False,  # a lock of the other kind would outlive its holder
        preserve_lock_file=True,  # `_release_all` does it; done a second time it would hit the next holder's file
    )
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        raise _unusable(path.parent, error) from error
    return lock


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        probe = _take(path)
    except LocksUnusable as error:
        if _has_no_locks(error):
            return False
        raise
    if probe is None:
        return True
    _release_all([probe])
    return False


def _release_all(locks: Sequence[FileLock]) -> None:
    for lock in reversed(locks):
        # Unlinked while it is held: a waiter that opened the old file meanwhile finds it unlinked and opens anew.
        with suppress(OSError):  # a file that stays behind is no lock
            Path(lock.lock_file).unlink()
        lock.release()


def _prepared(directory: Path) -> Path:
    """Return the folder, made if it is missing."""
    try:
        found = _stat(directory)
        if found is None or not stat.S_ISDIR(found.st_mode):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.stat()
    except OSError as error:
        raise _unusable(directory, error) from error
    if found.st_uid != os.getuid():
        raise LocksUnusable(
            f"The lock folder {directory} belongs to user {found.st_uid}: "
            "set FLUX_PREFECT_LOCKS to a folder of your own."
        )
    return directory


def _place(directory: Path) -> tuple[int, int]:
    """The identity of a folder, the same by whatever path it is reached."""
    try:
        found = directory.stat()
    except OSError as error:
        raise _unusable(directory, error) from error
    return found.st_dev, found.st_ino


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _has_no_locks(error: LocksUnusable) -> bool:
    """Whether the reason is the file system, and not the folder."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _WITHOUT_LOCKS


def _unusable(directory: Path, error: OSError) -> LocksUnusable:
    return LocksUnusable(
        f"The lock folder {directory} can't be used "
        f"{explain_os_error(error, 'set FLUX_PREFECT_LOCKS to a local folder that this user may write')}."
    )
