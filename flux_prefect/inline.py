"""Run a Prefect task as its engine would, with the same cache, locks and retries, but without a task run.

Every task run costs Prefect's server 25 to 30 ms of CPU time. For thousands of images, one task run covers many of
them, and their steps run here inside it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast
from uuid import UUID, uuid4

import anyio
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.schemas.objects import TaskRun
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.filesystems import LocalFileSystem, NullFileSystem
from prefect.logging import get_run_logger
from prefect.results import ResultRecord, ResultStore, get_result_store  # type: ignore[attr-defined]
from prefect.settings import get_current_settings
from prefect.states import Failed
from prefect.tasks import Task
from prefect.transactions import BaseTransaction, get_transaction

from flux_prefect.concurrency import run_in_thread
from flux_prefect.errors import FluxError, ResultStoreUnreadable
from flux_prefect.local_files import part_path

__all__ = ["StepResults", "StepRun", "current_step", "run_inline", "step_logger"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_ABSENT_CODES = {"NoSuchKey", "404", "NotFound"}


@dataclass
class StepResults:
    """The place of one step's result in Prefect's result storage.

    Attributes:
        store: The task's result store.
        key: The step's cache key.
        holder: The holder of the key's lock, if the policy has one.
        lifetime: How long the result is valid; None: without end.
        transaction: Prefect's transaction around the step, if it is run by Prefect's engine.
        stored: Whether the step itself has found or stored its result. The transaction then writes it no second time:
            Prefect writes local results in place, and another run would read half a record.
    """

    store: ResultStore
    key: str
    holder: str
    lifetime: timedelta | None = None
    transaction: BaseTransaction | None = None
    stored: bool = False

    async def read(self) -> Any:
        """Read the result; None if there is none, it has expired, or its record is broken.

        Prefect itself treats a storage that can't be read as empty.

        Raises:
            ResultStoreUnreadable: the storage can't be read.
        """
        record = await self.find()
        return None if record is None else record.result

    async def find(self) -> ResultRecord[Any] | None:
        """Find the valid record of the result. Raises as `read`."""
        record = await self._record()
        if record is None or _is_over(record):  # a broken or expired record is none: it is made anew
            return None
        self._settle()
        return record

    async def _record(self) -> ResultRecord[Any] | None:
        if self.store.metadata_storage is not None or self.store.result_storage is None:
            found = await self.store.aexists(self.key)
            return await self.store.aread(self.key, self.holder) if found else None
        try:
            content: Any = self.store.result_storage.read_path(self.key)
            if inspect.isawaitable(content):
                content = await content
        except Exception as error:
            if _is_absence(error):
                return None
            raise ResultStoreUnreadable(
                f"Prefect's result storage can't be read ({type(error).__name__}: {error}). It may hold what was paid "
                "for, so nothing was sent. Correct PREFECT_DEFAULT_RESULT_STORAGE_BLOCK or the block's keys, or its "
                "network, then run again."
            ) from error
        try:
            return ResultRecord.deserialize(content, backup_serializer=self.store.serializer)
        except Exception:  # noqa: BLE001 - whatever a serializer says of bytes that it did not write
            return None

    async def write(self, result: Any) -> None:
        """Store the result, whole at once. A failure is logged, as the engine does: the step has succeeded."""
        expiration: Any = None if self.lifetime is None else datetime.now(timezone.utc) + self.lifetime
        try:
            if isinstance(self.store.result_storage, LocalFileSystem) and self.store.metadata_storage is None:
                record = self.store.create_result_record(result, key=self.key, expiration=expiration)
                await run_in_thread(_write_record, record)
            else:
                await self.store.awrite(result, key=self.key, expiration=expiration, holder=self.holder)
            self._settle()
        except Exception:  # noqa: BLE001 - see above
            step_logger().exception("The result could not be stored under %s; the work goes on with it", self.key)

    def _settle(self) -> None:
        self.stored = True
        if self.transaction is not None:
            self.transaction.write_on_commit = False


def _is_over(record: ResultRecord[Any]) -> bool:
    expiration = record.metadata.expiration
    return expiration is not None and expiration <= datetime.now(timezone.utc)


def _write_record(record: ResultRecord[Any]) -> None:
    path = Path(cast("str", record.metadata.storage_key))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(path)
    try:
        part.write_bytes(record.serialize())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class StepRun:
    """The run of one step, over all its attempts.

    Attributes:
        id: The task run's id, or an id of its own if there is no task run.
        refresh: Whether to execute the step regardless of any cached result.
        news: The level at which its success is logged: `INFO` in a task run of its own, `DEBUG` inside a shared one.
        results: The place of its result in Prefect's result storage. None: it has none, or Prefect has looked there.
    """

    refresh: bool = False
    news: int = logging.INFO
    id: UUID = field(default_factory=uuid4)
    results: StepResults | None = None


_inline: ContextVar[StepRun | None] = ContextVar("inline", default=None)


def current_step() -> StepRun:
    """Return the step that this code runs in. Outside of any step, return a new one."""
    inline = _inline.get()
    if inline is not None:
        return inline
    context = TaskRunContext.get()
    if context is None:
        return StepRun()
    return StepRun(refresh=_refreshes(context.task), id=context.task_run.id, results=_results_of(context.task))


def _refreshes(task: Task[Any, Any]) -> bool:
    """Whether a task ignores cached results, by its own option or else by Prefect's setting."""
    if task.refresh_cache is not None:
        return bool(task.refresh_cache)
    return bool(get_current_settings().tasks.refresh_cache)


def _results_of(task: Task[Any, Any]) -> StepResults | None:
    transaction = get_transaction()
    if transaction is None or task.cache_policy == NO_CACHE:
        return None
    store, key = transaction.store, transaction.key
    if store is None or key is None or store.lock_manager is not None:  # under a lock Prefect itself has looked
        return None
    return StepResults(store, key, uuid4().hex, task.cache_expiration, transaction)


async def run_inline(task: Task[_P, Coroutine[Any, Any, _R]], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Return or raise what `await task(...)` would, with the same cache key, without calling Prefect's server.

    The task's cache policy with its lock, `refresh_cache`, `cache_expiration`, result storage and serializer, and
    `retries` with their delays and condition apply; all other options of a task (hooks, time-outs, jitter) do not.
    Locks are held for an attempt, and released if it is cancelled. A result that can't be stored is logged and
    returned.

    Works outside of any run as well: the log then goes to Python's own, and results to the storage of Prefect's
    settings. Only with `PREFECT_API_URL` set is the server asked for its default storage, once a step.

    Costs about a millisecond with a cache policy, and next to nothing without.

    Example:
        ```python
        from prefect import flow

        @flow
        async def publish_without_task_runs() -> None:
            await produce_image(request, bucket, credentials, run=run_inline)

        await publish_without_task_runs()
        ```
    """
    parameters = _bind(task.fn, args, kwargs)
    key = _key(task, parameters)
    results = None if key is None else StepResults(await _store(task), key, uuid4().hex, task.cache_expiration)
    step = StepRun(refresh=_refreshes(task), news=logging.DEBUG, results=results)
    for failures in itertools.count():
        token = _inline.set(step)
        try:
            if results is None:
                return await task.fn(*args, **kwargs)
            return await _through_cache(task, results, step, parameters)
        except Exception as error:
            if failures >= task.retries or not await _is_worth_repeating(task, step, error):
                raise
            delay = _delay(task.retry_delay_seconds, failures)
            step_logger().info(
                "%s failed with %r: retry %d of %d in %g s", task.name, error, failures + 1, task.retries, delay
            )
        finally:
            _inline.reset(token)
        await anyio.sleep(delay)
    raise AssertionError("a count has no end")


async def _through_cache(
    task: Task[Any, Coroutine[Any, Any, _R]], results: StepResults, step: StepRun, parameters: dict[str, Any]
) -> _R:
    store, key = results.store, results.key
    holder = results.holder
    if store.lock_manager is not None:
        await store.aacquire_lock(key, holder)
    try:
        if not step.refresh:
            with suppress(ResultStoreUnreadable):  # the step looks itself where a miss would cost money
                record = await results.find()
                if record is not None:
                    return cast("_R", record.result)
        result = await task.fn(**parameters)
        if not results.stored:
            await results.write(result)
        return result
    finally:
        if store.lock_manager is not None:
            store.release_lock(key, holder)


def _is_absence(error: Exception) -> bool:
    """Whether a storage's error means a missing object: a ValueError as of Prefect's own storages, or as of boto3."""
    if isinstance(error, (ValueError, FileNotFoundError, KeyError)):
        return not isinstance(error, FluxError)
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in _ABSENT_CODES


async def _store(task: Task[Any, Any]) -> ResultStore:
    store = get_result_store()
    settings = get_current_settings()
    if store.result_storage is None and settings.api.url is None and settings.results.default_storage_block is None:
        # Outside of any run Prefect asks its server for the default storage, and would start one just for that.
        store = ResultStore(result_storage=LocalFileSystem(basepath=str(settings.results.local_storage_path)))
    store = await store.aupdate_for_task(task)
    if isinstance(store.metadata_storage, NullFileSystem):  # a flow's way to keep none, which a task does not inherit
        store = store.model_copy(update={"metadata_storage": None})
    return store


def _bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


@functools.lru_cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _key(task: Task[Any, Any], parameters: dict[str, Any]) -> str | None:
    if not task.persist_result or not isinstance(task.cache_policy, CachePolicy):
        return None
    context = cast("TaskRunContext", None)  # no policy of ours looks at it
    return task.cache_policy.compute_key(task_ctx=context, inputs=parameters, flow_parameters={})


async def _is_worth_repeating(task: Task[Any, Any], step: StepRun, error: Exception) -> bool:
    if task.retry_condition_fn is None:
        return True
    run = TaskRun(id=step.id, task_key=task.task_key, dynamic_key=str(step.id))
    decision = task.retry_condition_fn(task, run, Failed(data=error))
    return bool(await decision if inspect.isawaitable(decision) else decision)


def _delay(delays: float | Sequence[float] | Callable[[int], list[float]] | None, failures: int) -> float:
    if isinstance(delays, Sequence):
        return delays[min(failures, len(delays) - 1)]
    return float(delays) if isinstance(delays, (int, float)) else 0.0


def step_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Return the logger of the enclosing run, or this module's own outside of any run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)
