from __future__ import annotations

import asyncio
import copy
import errno
import fcntl
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import anyio
import pytest
from prefect.filesystems import LocalFileSystem
from prefect.locking.protocol import LockManager
from prefect.results import ResultStore
from prefect.transactions import CommitMode, IsolationLevel, atransaction

from flux_prefect.errors import LocksUnusable
from flux_prefect.host.locks import HostLockManager
from flux_prefect.settings import current_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the lock files are."""
    return tmp_path / "locks"


@pytest.fixture
def locks(folder: Path) -> HostLockManager:
    """A manager of this process."""
    return HostLockManager(folder)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Real processes that don't each pay for importing Prefect."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flux_prefect.host.locks", "pytest"])
    return context


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def _count_up(workplace: Path) -> None:
    """One more in a file, failing where somebody else is at it too."""
    occupied = workplace / "occupied"
    occupied.touch(exist_ok=False)
    counter = workplace / "counter"
    before = int(counter.read_text()) if counter.exists() else 0
    time.sleep(0.0005)
    counter.write_text(str(before + 1))
    occupied.unlink()


def _count_under_lock(folder: Path, workplace: Path, times: int) -> None:
    manager = HostLockManager(folder)
    for turn in range(times):
        holder = f"{os.getpid()}-{threading.get_ident()}-{turn}"
        assert manager.acquire_lock("key", holder)
        _count_up(workplace)
        manager.release_lock("key", holder)


def _hold_for_ever(folder: Path, has_it: Path) -> None:
    manager = HostLockManager(folder)
    manager.acquire_lock("key", "the holder")
    has_it.touch()
    signal.pause()


def _fork_while_holding(folder: Path, report: Path) -> None:
    manager = HostLockManager(folder)
    manager.acquire_lock("key", "parent")
    if os.fork() == 0:
        manager.release_lock("key", "parent")
        seen = "locked" if manager.is_locked("key") and not manager.is_lock_holder("key", "parent") else "free"
        part = report.with_suffix(".part")
        part.write_text(f"{seen} {os.getpid()}")
        part.replace(report)
    signal.pause()


def _eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


@pytest.fixture
def holder_process(processes: ForkServerContext, folder: Path, tmp_path: Path) -> ForkServerProcess:
    """Another process, which has the lock on "key" until it is killed."""
    process = processes.Process(target=_hold_for_ever, args=(folder, tmp_path / "has it"), daemon=True)
    process.start()
    _eventually((tmp_path / "has it").exists)
    return process


def _kill(process: ForkServerProcess) -> None:
    process.kill()  # SIGKILL
    process.join()


class TestExclusion:
    """One holder at a time, of threads, tasks and processes."""

    def test_it_is_a_lock_manager_of_prefect(self, locks: HostLockManager) -> None:
        """Prefect takes it wherever it takes a lock manager."""
        assert isinstance(locks, LockManager)

    async def test_one_task_of_an_event_loop_holds_a_key_at_a_time(self, locks: HostLockManager) -> None:
        """Tasks that read, wait and write under one key lose no update."""
        total = 0

        async def add_one() -> None:
            nonlocal total
            async with locks.hold("key"):
                before = total
                await asyncio.sleep(0.001)
                total = before + 1

        await asyncio.gather(*(add_one() for _ in range(12)))

        assert total == 12

    def test_one_thread_holds_a_key_at_a_time(self, folder: Path, locks: HostLockManager, tmp_path: Path) -> None:
        """Threads exclude each other, by one manager and by managers of their own."""

        def count_with_the_shared_one(thread: int) -> None:
            for turn in range(10):
                holder = f"{thread}-{turn}"
                assert locks.acquire_lock("key", holder)
                _count_up(tmp_path)
                locks.release_lock("key", holder)

        with ThreadPoolExecutor() as pool:
            work = [pool.submit(count_with_the_shared_one, thread) for thread in range(3)]
            work += [pool.submit(_count_under_lock, folder, tmp_path, 10) for _ in range(3)]
            for future in work:
                future.result()

        assert (tmp_path / "counter").read_text() == "60"

    def test_two_event_loops_hold_a_key_one_after_the_other(self, folder: Path, tmp_path: Path) -> None:
        """In one process, whatever the managers are, and by whatever path they reach the folder."""
        folder.mkdir()
        (tmp_path / "link").symlink_to(folder)
        spellings = [folder, tmp_path / "link", tmp_path / "elsewhere" / ".." / folder.name]
        (tmp_path / "elsewhere").mkdir()

        async def count(path: Path) -> None:
            locks, others = HostLockManager(path), HostLockManager(folder)
            for _ in range(5):
                for one in (locks, others):
                    async with one.hold("key"):
                        await asyncio.to_thread(_count_up, tmp_path)

        async def count_twice(path: Path) -> None:
            await asyncio.gather(count(path), count(path))

        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(asyncio.run, count_twice(path)) for path in spellings]:
                done.result()
        assert (tmp_path / "counter").read_text() == str(3 * 2 * 5 * 2)

    async def test_a_second_manager_of_the_same_thread_is_excluded(self, folder: Path, tmp_path: Path) -> None:
        """A single look fails, also through a link, and a look at the lock sees it."""
        folder.mkdir()
        (tmp_path / "link").symlink_to(folder)
        first, second = HostLockManager(folder), HostLockManager(tmp_path / "link")
        async with first.hold("key"):
            assert not second.acquire_lock("key", "holder", acquire_timeout=0)
            assert not await second.aacquire_lock("key", "holder", acquire_timeout=0)
            assert second.is_locked("key")
        assert second.acquire_lock("key", "holder", acquire_timeout=0)
        second.release_lock("key", "holder")

    def test_one_process_holds_a_key_at_a_time(
        self, processes: ForkServerContext, folder: Path, tmp_path: Path
    ) -> None:
        """Many quick cycles of processes with threads, lock files unlinked under each other, never overlap."""
        workers = [processes.Process(target=_count_in_threads, args=(folder, tmp_path)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert (tmp_path / "counter").read_text() == str(3 * 2 * 40)
        assert _files(folder) == []

    def test_different_keys_do_not_wait_for_each_other(self, locks: HostLockManager) -> None:
        """A lock is on its key alone."""
        assert locks.acquire_lock("one", "holder", acquire_timeout=0)
        assert locks.acquire_lock("two", "another", acquire_timeout=0)
        locks.release_lock("one", "holder")
        assert locks.is_locked("two")
        locks.release_lock("two", "another")

    def test_different_folders_do_not_exclude_each_other(self, tmp_path: Path) -> None:
        """Managers exclude each other by their folder and by nothing else."""
        one, two = HostLockManager(tmp_path / "one"), HostLockManager(tmp_path / "two")
        assert one.acquire_lock("key", "a", acquire_timeout=0)
        assert two.acquire_lock("key", "b", acquire_timeout=0)
        one.release_lock("key", "a")
        two.release_lock("key", "b")

    def test_a_key_can_be_anything(self, locks: HostLockManager, folder: Path) -> None:
        """Slashes, dots and length of a key never lead out of the folder."""
        for key in ("../../outside", "/etc/passwd", "x" * 5000, "Ünïcode 🗝", ""):
            assert locks.acquire_lock(key, "holder", acquire_timeout=0)
            assert [path.parent for path in folder.iterdir()] == [folder]
            locks.release_lock(key, "holder")


def _count_in_threads(folder: Path, workplace: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(_count_under_lock, folder, workplace, 40) for _ in range(2)]:
            future.result()


class TestDeathOfAHolder:
    """Locks die with their holder."""

    def test_a_killed_process_frees_its_lock_at_once(
        self, locks: HostLockManager, holder_process: ForkServerProcess
    ) -> None:
        """A waiter has the lock within a second after its holder is killed with -9."""
        assert not locks.acquire_lock("key", "waiter", acquire_timeout=0.05)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(locks.acquire_lock, "key", "waiter", 30)
            time.sleep(0.4)  # by now the waiter looks as seldom as it ever does
            assert not waiting.done()

            _kill(holder_process)
            died = time.monotonic()

            assert waiting.result()
            assert time.monotonic() - died < 1
        locks.release_lock("key", "waiter")

    async def test_a_waiting_coroutine_gets_the_lock_of_a_killed_process(
        self, locks: HostLockManager, holder_process: ForkServerProcess
    ) -> None:
        """It is the same for a waiter on an event loop."""
        waiting = asyncio.create_task(locks.aacquire_lock("key", "waiter"))
        await asyncio.sleep(0.05)
        assert not waiting.done()

        _kill(holder_process)

        with anyio.fail_after(1):
            assert await waiting
        locks.release_lock("key", "waiter")

    def test_a_lock_of_another_process_is_seen(self, locks: HostLockManager, holder_process: ForkServerProcess) -> None:
        """is_locked and wait_for_lock report holders in other processes, which can't be released from here."""
        assert locks.is_locked("key")
        assert not locks.is_lock_holder("key", "the holder")
        locks.release_lock("key", "the holder")
        assert not locks.wait_for_lock("key", timeout=0.05)

        _kill(holder_process)

        assert locks.wait_for_lock("key", timeout=1)
        assert not locks.is_locked("key")

    def test_a_forked_child_has_none_of_its_parents_locks(
        self, processes: ForkServerContext, folder: Path, tmp_path: Path
    ) -> None:
        """A child can neither release what its parent held at the fork nor keep it locked after the parent's death."""
        parent = processes.Process(target=_fork_while_holding, args=(folder, tmp_path / "child"), daemon=True)
        parent.start()
        _eventually((tmp_path / "child").exists)
        seen_by_child, _, pid = (tmp_path / "child").read_text().partition(" ")
        try:
            locks = HostLockManager(folder)
            assert seen_by_child == "locked"
            assert not locks.acquire_lock("key", "waiter", acquire_timeout=0)

            _kill(parent)

            assert locks.acquire_lock("key", "waiter", acquire_timeout=1)
            locks.release_lock("key", "waiter")
        finally:
            os.kill(int(pid), signal.SIGKILL)
            _kill(parent)


class TestAcquiring:
    """Taking a lock, or not."""

    @pytest.mark.parametrize("timeout", [0, 0.05])
    def test_a_time_out_ends_the_wait(self, locks: HostLockManager, timeout: float) -> None:
        """An acquirer gets False after its time, and not much later."""
        locks.acquire_lock("key", "holder")
        started = time.monotonic()

        assert not locks.acquire_lock("key", "waiter", acquire_timeout=timeout)

        assert timeout <= time.monotonic() - started < timeout + 0.5
        assert not locks.is_lock_holder("key", "waiter")
        locks.release_lock("key", "holder")

    async def test_a_time_out_ends_the_wait_of_a_coroutine(self, locks: HostLockManager) -> None:
        """The asynchronous twin gives up as well."""
        await locks.aacquire_lock("key", "holder")
        assert not await locks.aacquire_lock("key", "waiter", acquire_timeout=0)
        assert not await locks.aacquire_lock("key", "waiter", acquire_timeout=0.05)
        locks.release_lock("key", "holder")
        assert await locks.aacquire_lock("key", "waiter", acquire_timeout=0)
        locks.release_lock("key", "waiter")

    def test_the_same_holder_may_acquire_twice(self, locks: HostLockManager) -> None:
        """A holder has its lock already; one release frees it."""
        assert locks.acquire_lock("key", "holder")
        assert locks.acquire_lock("key", "holder", acquire_timeout=0)

        locks.release_lock("key", "holder")

        assert not locks.is_locked("key")

    async def test_the_event_loop_runs_while_somebody_waits(self, locks: HostLockManager) -> None:
        """Waiting for a lock blocks no other task."""
        locks.acquire_lock("key", "holder")
        waiting = [asyncio.create_task(locks.aacquire_lock("key", "waiter")) for _ in range(5)]
        waiting.append(asyncio.create_task(locks.await_for_lock("key")))
        longest, last = 0.0, time.monotonic()
        while (now := time.monotonic()) < last + 0.3:
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - now)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

        assert longest < 0.1
        locks.release_lock("key", "holder")

    def test_a_holder_is_known_by_its_name(self, locks: HostLockManager) -> None:
        """is_lock_holder is true for the holder alone, while it holds."""
        locks.acquire_lock("key", "holder")
        assert locks.is_lock_holder("key", "holder")
        assert not locks.is_lock_holder("key", "another")
        assert not locks.is_lock_holder("another key", "holder")
        locks.release_lock("key", "holder")
        assert not locks.is_lock_holder("key", "holder")


class TestReleasing:
    """Giving a lock back."""

    def test_releasing_what_is_not_held_does_nothing(self, locks: HostLockManager) -> None:
        """Neither a free lock nor one released before raises."""
        locks.release_lock("key", "holder")
        locks.acquire_lock("key", "holder")
        locks.release_lock("key", "holder")
        locks.release_lock("key", "holder")
        assert not locks.is_locked("key")

    def test_releasing_what_another_holds_does_nothing(self, locks: HostLockManager) -> None:
        """A release by another holder leaves the lock held."""
        locks.acquire_lock("key", "holder")

        locks.release_lock("key", "another")

        assert locks.is_lock_holder("key", "holder")
        assert not locks.acquire_lock("key", "another", acquire_timeout=0)
        locks.release_lock("key", "holder")

    def test_no_file_is_left(self, locks: HostLockManager, folder: Path) -> None:
        """The folder is empty once all locks are released and looked at."""
        locks.acquire_lock("key", "holder")
        assert len(list(folder.iterdir())) == 1
        locks.release_lock("key", "holder")
        assert not locks.is_locked("key")
        assert _files(folder) == []

    def test_the_file_of_a_killed_holder_is_cleared_away(
        self, locks: HostLockManager, holder_process: ForkServerProcess, folder: Path
    ) -> None:
        """What a crash leaves behind is no lock, and goes with the next look at it."""
        _kill(holder_process)
        assert len(list(folder.iterdir())) == 1
        assert not locks.is_locked("key")
        assert _files(folder) == []

    def test_a_folder_deleted_meanwhile_does_no_harm(self, locks: HostLockManager, folder: Path) -> None:
        """A release after somebody emptied the temporary folder does not raise, and the next lock works."""
        locks.acquire_lock("key", "holder")
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

        locks.release_lock("key", "holder")

        assert locks.acquire_lock("key", "another", acquire_timeout=0)
        locks.release_lock("key", "another")


class TestWaiting:
    """Waiting without taking."""

    def test_waiting_ends_when_the_lock_is_free(self, locks: HostLockManager) -> None:
        """wait_for_lock returns True at the release and takes nothing."""
        locks.acquire_lock("key", "holder")
        threading.Timer(0.1, locks.release_lock, ("key", "holder")).start()

        assert locks.wait_for_lock("key", timeout=10)

        assert locks.acquire_lock("key", "another", acquire_timeout=0)
        locks.release_lock("key", "another")

    async def test_a_coroutine_can_wait_too(self, locks: HostLockManager) -> None:
        """await_for_lock has a time-out, and ends at the release."""
        locks.acquire_lock("key", "holder")
        assert not await locks.await_for_lock("key", timeout=0)
        assert not await locks.await_for_lock("key", timeout=0.02)
        asyncio.get_running_loop().call_later(0.05, locks.release_lock, "key", "holder")
        assert await locks.await_for_lock("key", timeout=10)

    def test_a_free_lock_needs_no_wait(self, locks: HostLockManager) -> None:
        """A key that was never locked is free."""
        assert not locks.is_locked("key")
        assert locks.wait_for_lock("key", timeout=0)


class TestHold:
    """The lock as a block."""

    async def test_it_frees_the_lock_after_an_error(self, locks: HostLockManager) -> None:
        """Whatever happens inside, the lock is free afterwards."""
        with suppress(RuntimeError):
            async with locks.hold("key"):
                assert locks.is_locked("key")
                raise RuntimeError
        assert not locks.is_locked("key")

    async def test_a_cancelled_waiter_leaves_no_lock(self, locks: HostLockManager, folder: Path) -> None:
        """Giving up the wait, by a scope or a task's own cancel, takes no lock and affects no other waiter."""

        async def wait() -> None:
            async with locks.hold("key"):
                pytest.fail("two at once")

        async with locks.hold("key"):
            with anyio.move_on_after(0.05):
                await wait()
            task = asyncio.create_task(wait())
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert not locks.is_locked("key")
        assert _files(folder) == []

    async def test_a_cancelled_holder_frees_its_lock(self, locks: HostLockManager) -> None:
        """A task that is cancelled while it holds a lock takes it along."""

        async def hold() -> None:
            async with locks.hold("key"):
                await asyncio.sleep(60)

        task = asyncio.create_task(hold())
        await asyncio.sleep(0.02)
        assert locks.is_locked("key")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not locks.is_locked("key")


class TestCopies:
    """Managers that Prefect copies and pickles."""

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])  # noqa: S301 - our own
    def test_a_copy_excludes_and_is_excluded(
        self, locks: HostLockManager, duplicate: Callable[[HostLockManager], HostLockManager]
    ) -> None:
        """A copied or pickled manager has the same folder and holds nothing."""
        locks.acquire_lock("key", "holder")

        other = duplicate(locks)

        assert other.is_locked("key")
        assert not other.is_lock_holder("key", "holder")
        other.release_lock("key", "holder")
        assert not other.acquire_lock("key", "holder", acquire_timeout=0)
        locks.release_lock("key", "holder")
        assert other.acquire_lock("key", "another", acquire_timeout=0)
        assert locks.is_locked("key")
        other.release_lock("key", "another")


class TestFolder:
    """Where the locks are."""

    def test_it_is_private(self, locks: HostLockManager, folder: Path) -> None:
        """The folder is made for its user alone."""
        locks.is_locked("key")
        assert folder.stat().st_mode & 0o777 == 0o700

    def test_the_setting_names_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A manager without a folder of its own uses FLUX_PREFECT_LOCKS."""
        monkeypatch.setenv("FLUX_PREFECT_LOCKS", str(tmp_path / "elsewhere"))
        manager = HostLockManager()
        manager.acquire_lock("key", "holder")
        assert HostLockManager(tmp_path / "elsewhere").is_locked("key")
        manager.release_lock("key", "holder")

    def test_a_folder_of_another_user_is_refused(self, tmp_path: Path) -> None:
        """Locks in a folder that somebody else owns could be taken away: the error names the setting."""
        if os.getuid() == 0:
            os.chown(tmp_path, 12345, -1)
        manager = HostLockManager(tmp_path if os.getuid() == 0 else Path("/usr"))
        with pytest.raises(LocksUnusable, match=r"belongs to user .*FLUX_PREFECT_LOCKS"):
            manager.acquire_lock("key", "holder")

    @pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/flux"])
    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path, place: str) -> None:
        """Every method says which folder can't be used and which setting changes it."""
        (tmp_path / "a file").touch()
        manager = HostLockManager(tmp_path / place)
        for look in (manager.is_locked, manager.wait_for_lock, lambda key: manager.acquire_lock(key, "holder")):
            with pytest.raises(LocksUnusable, match=rf"{place}.*FLUX_PREFECT_LOCKS"):
                look("key")

    def test_a_lock_file_that_cannot_be_opened_is_an_error(
        self, locks: HostLockManager, folder: Path, tmp_path: Path
    ) -> None:
        """What stands in a lock file's place is an error with a remedy, and a link there is never followed."""
        locks.acquire_lock("key", "holder")
        (file,) = folder.iterdir()
        locks.release_lock("key", "holder")
        file.symlink_to(tmp_path / "target")

        with pytest.raises(LocksUnusable, match="FLUX_PREFECT_LOCKS"):
            locks.acquire_lock("key", "holder", acquire_timeout=5)
        assert not (tmp_path / "target").exists()


class TestSeveralFolders:
    """A spool's folder beside the host's."""

    @pytest.fixture(autouse=True)
    def host(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A host with a temporary folder, and no lock folder of the developer's."""
        monkeypatch.delenv("FLUX_PREFECT_LOCKS")
        self._use(monkeypatch, tmp_path / "host", "spool")
        return tmp_path

    @staticmethod
    def _use(monkeypatch: pytest.MonkeyPatch, temporary: Path, spool: str) -> None:
        temporary.mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        monkeypatch.setenv("FLUX_PREFECT_SPOOL", str(temporary.parent / spool))

    async def test_a_folder_that_is_named_twice_is_locked_once(self) -> None:
        """A link from the spool to the host's folder makes nobody wait for himself."""
        host_folder, in_spool = current_settings().lock_folders
        host_folder.mkdir(mode=0o700)
        in_spool.parent.mkdir(parents=True)
        in_spool.symlink_to(host_folder)
        locks, others = HostLockManager(), HostLockManager()
        locks.prepare()
        with anyio.fail_after(10):
            async with locks.hold("key"):
                assert not others.acquire_lock("key", "holder", acquire_timeout=0)
        assert others.acquire_lock("key", "holder", acquire_timeout=0)
        others.release_lock("key", "holder")
        assert _files(host_folder) == []

    @pytest.mark.parametrize(("temporary", "spool"), [("container", "spool"), ("host", "another spool")])
    def test_one_shared_folder_is_enough(
        self, host: Path, monkeypatch: pytest.MonkeyPatch, temporary: str, spool: str
    ) -> None:
        """Runs exclude each other by the spool's locks or by the host's, and who waits leaves nothing locked."""
        first, second = HostLockManager(), HostLockManager()
        assert first.acquire_lock("key", "first")
        self._use(monkeypatch, host / temporary, spool)
        assert second.is_locked("key")
        assert not second.acquire_lock("key", "second", acquire_timeout=0)

        first.release_lock("key", "first")

        assert not second.is_locked("key")
        assert second.acquire_lock("key", "second", acquire_timeout=0)
        second.release_lock("key", "second")
        assert list(host.rglob("*.lock")) == []

    def test_a_spool_without_locks_is_reported(
        self, host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The run goes on with the host's locks, and says that it is alone with them."""
        with lockless(host / "spool", monkeypatch):
            locks = HostLockManager()
            locks.prepare()
            (warning,) = caplog.messages
            assert str(host / "spool" / "locks") in warning
            assert "alone" in warning
            assert "FLUX_PREFECT_LOCKS" in warning
            assert locks.acquire_lock("key", "holder", acquire_timeout=0)
            assert HostLockManager().is_locked("key")
            locks.release_lock("key", "holder")
            assert not locks.is_locked("key")

    def test_no_locks_at_all_is_an_error(self, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before money, with the folder and the setting."""
        with lockless(host, monkeypatch), pytest.raises(LocksUnusable, match=r"FLUX_PREFECT_LOCKS"):
            HostLockManager().prepare()


@contextmanager
def lockless(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel answers for files below a folder as it does on a network file system without locks."""
    flock = fcntl.flock

    def refuse(file: int, operation: int) -> None:
        if Path(f"/proc/self/fd/{file}").readlink().is_relative_to(folder):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(file, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        yield


class TestPrefectTransactions:
    """The lock manager in Prefect's own hands."""

    @pytest.fixture
    def store(self, tmp_path: Path, locks: HostLockManager) -> ResultStore:
        """Results in files, locked by ours."""
        return ResultStore(
            result_storage=LocalFileSystem(basepath=str(tmp_path / "results")),
            lock_manager=locks,
        )

    async def test_a_key_is_computed_once(self, store: ResultStore) -> None:
        """Of many SERIALIZABLE transactions with one key at the same time, one computes."""
        computed = 0

        async def compute() -> None:
            nonlocal computed
            async with atransaction("key", store=store, isolation_level=IsolationLevel.SERIALIZABLE) as work:
                if not work.is_committed():
                    await asyncio.sleep(0.01)
                    computed += 1
                    work.stage({"value": computed})

        await asyncio.gather(*(compute() for _ in range(6)))

        assert computed == 1

    async def test_a_nested_eager_transaction_is_released_twice_without_harm(
        self, store: ResultStore, folder: Path
    ) -> None:
        """A child that committed at once and its parent are both committed, and no lock stays."""
        async with atransaction("outer", store=store, isolation_level=IsolationLevel.SERIALIZABLE) as outer:
            async with atransaction(
                "inner", store=store, isolation_level=IsolationLevel.SERIALIZABLE, commit_mode=CommitMode.EAGER
            ) as inner:
                inner.stage("inside")
            async with atransaction(
                "inner", store=store, isolation_level=IsolationLevel.SERIALIZABLE, commit_mode=CommitMode.EAGER
            ) as again:
                assert again.is_committed()
            outer.stage("outside")

        assert outer.is_committed()
        assert await store.aexists("inner")
        assert await store.aexists("outer")
        assert _files(folder) == []
