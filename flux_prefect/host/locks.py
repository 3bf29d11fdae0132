"""Locks that end with their holder, for work that must happen once on a host."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
from filelock import FileLock, Timeout
from prefect.locking.protocol import LockManager

from flux_prefect.local_files import explain_os_error
from flux_prefect.settings import current_settings

__all__ = ["HostLockManager"]

_FIRST_WAIT = 0.01
_LONGEST_WAIT = 0.25


class HostLockManager(LockManager):
    """A Prefect lock manager over kernel file locks.

    Guarantees: of all processes, threads and event loops of one host that share `directory`, one holds a
    key at a time. A holder that dies, even by `kill -9`, frees its locks at once; so does a manager that is
    garbage-collected. Waiting blocks no event loop in the async methods. Releasing a lock that is not held does
    nothing: Prefect's transactions release twice where one is nested in another.

    Costs about 0.4 ms for a lock and its release. Waiters look again after 10 to 250 ms, in no order. A single look
    (`acquire_timeout=0`) can also fail while another process releases the lock or looks at it.

    Args:
        directory: Where the lock files are. Default: the setting `FLUX_PREFECT_LOCKS`. It must not be on a
            network file system.

    Raises:
        PermissionError: the folder can't be used. Raised by every method that looks at a lock.

    Example:
        ```python
        async with HostLockManager().hold("catalogue"):
            ...  # one process of this host at a time
        ```
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        # By process as well: a forked child inherits this dictionary, but none of the locks.
        self._held: dict[tuple[int, str], tuple[str, FileLock]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, in this process or another, holds nothing: locks belong to the original's open files.
        return type(self), (self._directory,)

    def prepare(self) -> None:
        """Make the lock folder.

        Raises:
            PermissionError: it can't be used; the message names the setting.
        """
        _make_private(self._folder())

    def acquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,  # noqa: ARG002 - the kernel frees a dead holder's lock instead
    ) -> bool:
        """Take the lock, waiting at most `acquire_timeout` seconds (None: as long as it takes)."""
        waits = _Waits(acquire_timeout)
        while not self._try(key, holder):
            pause = waits.next()
            if pause is None:
                return False
            time.sleep(pause)
        return True

    async def aacquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,  # noqa: ARG002 - the kernel frees a dead holder's lock instead
    ) -> bool:
        """Like `acquire_lock`, without blocking the event loop."""
        waits = _Waits(acquire_timeout)
        while not self._try(key, holder):
            pause = waits.next()
            if pause is None:
                return False
            await anyio.sleep(pause)
        return True

    def release_lock(self, key: str, holder: str) -> None:
        """Free the lock if this holder has it; do nothing otherwise."""
        if not self.is_lock_holder(key, holder):
            return
        _, lock = self._held.pop(_here(key))
        _remove(lock)

    def is_locked(self, key: str) -> bool:
        """Whether any process on this host holds the lock now."""
        if _here(key) in self._held:
            return True
        path = self._path(key)
        if not path.exists():
            return False
        probe = _take(path)
        if probe is None:
            return True
        _remove(probe)
        return False

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether this very holder has the lock."""
        held = self._held.get(_here(key))
        return held is not None and held[0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Wait until the lock is free. Return False after `timeout` seconds."""
        waits = _Waits(timeout)
        while self.is_locked(key):
            pause = waits.next()
            if pause is None:
                return False
            time.sleep(pause)
        return True

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - Prefect's name
        """Like `wait_for_lock`, without blocking the event loop."""
        waits = _Waits(timeout)
        while self.is_locked(key):
            pause = waits.next()
            if pause is None:
                return False
            await anyio.sleep(pause)
        return True

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
        lock = _take(self._path(key))
        if lock is None:
            return False
        self._held[_here(key)] = (holder, lock)
        return True

    def _folder(self) -> Path:
        return self._directory or current_settings().locks

    def _path(self, key: str) -> Path:
        directory = self._folder()
        _make_private(directory)
        return directory / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.lock"


class _Waits:
    """Growing pauses between two looks at a lock, until the time-out."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout
        self._pause = _FIRST_WAIT

    def next(self) -> float | None:
        pause, self._pause = self._pause, min(self._pause * 1.5, _LONGEST_WAIT)
        if self._end is None:
            return pause
        left = self._end - time.monotonic()
        return min(pause, left) if left > 0 else None


def _here(key: str) -> tuple[int, str]:
    return os.getpid(), key


def _take(path: Path) -> FileLock | None:
    lock = FileLock(
        path,
        thread_local=False,
        fallback_to_soft=False,  # a lock of the other kind would outlive its holder
        preserve_lock_file=True,  # `_remove` does it; done a second time it would hit the next holder's file
    )
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        raise _unusable(path.parent, error) from error
    return lock


def _remove(lock: FileLock) -> None:
    # Unlinked while it is held: a waiter that opened the old file meanwhile finds it unlinked and opens anew.
    with suppress(OSError):  # a file that stays behind is no lock
        Path(lock.lock_file).unlink()
    lock.release()


def _make_private(directory: Path) -> None:
    try:
        found = _stat(directory)
        if found is None or not stat.S_ISDIR(found.st_mode):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.stat()
    except OSError as error:
        raise _unusable(directory, error) from error
    if found.st_uid != os.getuid():
        raise PermissionError(
            f"The lock folder {directory} belongs to user {found.st_uid}: "
            "set FLUX_PREFECT_LOCKS to a folder of your own."
        )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _unusable(directory: Path, error: OSError) -> PermissionError:
    return PermissionError(
        f"The lock folder {directory} can't be used "
        f"{explain_os_error(error, 'set FLUX_PREFECT_LOCKS to a local folder that this user may write')}."
    )
