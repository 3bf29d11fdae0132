"""Steps without task runs: they must be to cache, locks, retries and money what task runs are."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.filesystems import LocalFileSystem
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_TASKS_REFRESH_CACHE,
    temporary_settings,
)
from prefect.tasks import Task
from prefect.transactions import IsolationLevel

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.cache_policies import GENERATION
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.host.locks import HostLockManager
from flux_prefect.inline import current_step, run_inline
from flux_prefect.pipeline import StepRunner, produce_image, run_as_task
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tasks import download_image, generate_image, upload_to_s3

pytestmark = pytest.mark.usefixtures("prefect_server")

BOTH_WAYS = pytest.mark.parametrize(
    ("first", "then"), [(run_as_task, run_inline), (run_inline, run_as_task)], ids=["kept-by-a-run", "kept-inline"]
)


LOCKED = GENERATION.configure(isolation_level=IsolationLevel.SERIALIZABLE, lock_manager=HostLockManager())
"""A policy as somebody may configure it for a task of their own."""


class Counted:
    """A task cached on prompt + seed that counts how often it is really done.

    Args:
        seconds: how long it takes.
        failures: how often it fails before it succeeds.
        options: the task's own.
    """

    def __init__(self, seconds: float = 0.0, failures: int = 0, **options: Any) -> None:
        self.done = 0
        self.begun = asyncio.Event()
        self.seconds = seconds
        self.failures = failures
        self.task = task(
            **{
                "name": "counted",
                "cache_policy": LOCKED,
                "persist_result": True,
                "result_serializer": "json",
                "cache_result_in_memory": False,
                **options,
            }
        )(self._do)

    async def _do(self, request: ImageRequest, credentials: AimlApiCredentials) -> dict[str, Any]:
        self.done += 1
        self.begun.set()
        mine = self.done
        await asyncio.sleep(self.seconds)
        if mine <= self.failures:
            raise ConnectionError(f"failure {mine}")
        return {"prompt": request.prompt, "at": credentials.base_url, "done": mine}


async def in_a_flow(*work: Callable[[], Awaitable[Any]]) -> list[Any]:
    """What some work gives in a flow run of its own, all of it at once."""

    @flow(persist_result=False)
    async def together() -> list[Any]:
        return list(await asyncio.gather(*(each() for each in work)))

    return await together()


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for Prefect's results."""
    folder = tmp_path / "results"
    folder.mkdir()
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: folder}):
        yield folder


class TestOutside:
    """A plain script, without any flow."""

    async def test_an_image_is_published_without_a_run_and_without_a_server(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, bucket: ImageBucket, request_: ImageRequest
    ) -> None:
        """All three steps and the whole path, paid for once; Prefect's server is neither asked nor started."""
        with temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}, restore_defaults={PREFECT_API_URL}):
            generation = await run_inline(generate_image, request_, credentials)
            file = await run_inline(download_image, generation, credentials)
            published = await run_inline(upload_to_s3, file, bucket)
            production = await produce_image(request_, bucket, credentials, run=run_inline)

        (again,) = production.images
        assert again.image is not None
        assert (again.image.uri, again.image.created) == (published.uri, False)
        assert sandbox.control.summary().billed_calls == 1


class TestCache:
    """One cache for both."""

    @pytest.mark.parametrize("run", [run_as_task, run_inline], ids=["steps", "chunks"])
    async def test_the_setting_of_the_process_refreshes_it(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest, run: StepRunner
    ) -> None:
        """`PREFECT_TASKS_REFRESH_CACHE` pays anew in either density, past the spool as well; a task's own option wins.

        Without it the newest answer counts.
        """
        generate_once = generate_image.with_options(refresh_cache=False)

        async def make() -> list[Any]:
            made = [await run(generate_image, request_, credentials)]
            with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}):
                made += [await run(step, request_, credentials) for step in (generate_image, generate_once)]
            return [*made, await run(generate_image, request_, credentials)]

        ((first, second, kept, found),) = await in_a_flow(make)

        assert first != second
        assert second == kept == found
        assert sandbox.control.summary().billed_calls == 2

    @BOTH_WAYS
    async def test_either_finds_what_the_other_kept(
        self,
        sandbox: RunningSandbox,
        credentials: AimlApiCredentials,
        request_: ImageRequest,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        first: StepRunner,
        then: StepRunner,
    ) -> None:
        """The real tasks, in two flow runs with no spool in common: one call, one download, the same records."""

        async def make(run: StepRunner) -> list[Any]:
            generation = await run(generate_image, request_, credentials)
            return [generation, await run(download_image, generation, credentials, 0)]

        kept = await in_a_flow(lambda: make(first))
        monkeypatch.setenv("FLUX_PREFECT_SPOOL", str(tmp_path / "another"))
        found = await in_a_flow(lambda: make(then))

        assert found == kept
        assert sandbox.control.summary().calls == 1
        assert sandbox.control.summary().downloads == 1

    async def test_both_keep_the_same_record(
        self, credentials: AimlApiCredentials, request_: ImageRequest, storage: Path
    ) -> None:
        """Under the same key, in the same form."""
        records = []
        for run in (run_as_task, run_inline):
            counted = Counted()
            await in_a_flow(partial(run, counted.task, request_, credentials))
            (file,) = storage.iterdir()
            record = json.loads(file.read_bytes())
            metadata = record["metadata"]
            records.append((file.name, record["result"], metadata["serializer"], metadata["expiration"]))
            file.unlink()

        assert records[0] == records[1]
        assert records[0][0] == f"flux-generation-{request_.fingerprint(credentials.base_url)}"

    async def test_it_is_found_in_the_same_run_too(
        self, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """Default arguments and keywords make no other key."""
        counted = Counted()

        async def twice() -> list[Any]:
            return [
                await run_inline(counted.task, request_, credentials),
                await run_inline(counted.task, credentials=credentials, request=request_),
            ]

        ((one, two),) = await in_a_flow(twice)
        assert one == two
        assert counted.done == 1

    async def test_without_a_seed_nothing_is_kept(
        self, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """As the policy has it."""
        counted, unseeded = Counted(), request_.model_copy(update={"seed": None})
        await in_a_flow(*(lambda: run_inline(counted.task, unseeded, credentials) for _ in range(2)))

        assert counted.done == 2

    async def test_refreshing_does_it_anew(self, credentials: AimlApiCredentials, request_: ImageRequest) -> None:
        """The new result takes the old one's place, and the step sees `refresh`."""
        counted = Counted()
        again = counted.task.with_options(refresh_cache=True)
        results = [
            (await in_a_flow(partial(run_inline, step, request_, credentials)))[0]["done"]
            for step in (counted.task, again, counted.task)
        ]

        assert results == [1, 2, 2]

    async def test_refreshing_the_real_task_pays_anew(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """The spool doesn't stand in its way."""
        again = generate_image.with_options(refresh_cache=True)
        await in_a_flow(lambda: run_inline(generate_image, request_, credentials))
        await in_a_flow(lambda: run_inline(again, request_, credentials))

        assert sandbox.control.summary().billed_calls == 2

    @pytest.mark.parametrize("content", [b"", b'{"metadata": {"stor', b"\x00" * 500], ids=["empty", "cut", "noise"])
    async def test_a_result_that_cannot_be_read_is_made_anew(
        self, credentials: AimlApiCredentials, request_: ImageRequest, storage: Path, content: bytes
    ) -> None:
        """A power cut while it was written costs the step, not the run; the file is whole again."""
        counted = Counted()
        await in_a_flow(lambda: run_inline(counted.task, request_, credentials))
        (file,) = storage.iterdir()
        file.write_bytes(content)
        (result,) = await in_a_flow(lambda: run_inline(counted.task, request_, credentials))

        assert result["done"] == 2
        assert await in_a_flow(lambda: run_as_task(counted.task, request_, credentials)) == [result]
        assert counted.done == 2

    async def test_a_result_that_cannot_be_kept_is_returned(
        self,
        credentials: AimlApiCredentials,
        request_: ImageRequest,
        storage: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """What was paid for is used, and the failure is logged."""
        storage.rmdir()
        storage.write_bytes(b"no folder")
        counted = Counted()
        (result,) = await in_a_flow(lambda: run_inline(counted.task, request_, credentials))
        storage.unlink()

        assert result["done"] == 1
        assert "The result could not be stored" in caplog.text


class TestRecords:
    """Prefect writes local results in place: whoever reads at that moment finds half a record."""

    @pytest.mark.parametrize("run", [run_as_task, run_inline], ids=["task-run", "inline"])
    async def test_a_record_is_never_seen_half_written(
        self,
        credentials: AimlApiCredentials,
        request_: ImageRequest,
        monkeypatch: pytest.MonkeyPatch,
        storage: Path,
        run: StepRunner,
    ) -> None:
        """Nothing goes through the writer that truncates first, neither when it is paid nor when it is found."""
        in_place = []
        for name in ("write_path", "awrite_path"):
            monkeypatch.setattr(LocalFileSystem, name, lambda _, path, **__: in_place.append(path))

        async def make() -> list[Any]:
            generation = await run(generate_image, request_, credentials)
            return [generation, await run(download_image, generation, credentials, 0)]

        first = await in_a_flow(make)
        for record in storage.iterdir():
            record.unlink()  # the next run finds the answer in the spool, and stores it again

        assert await in_a_flow(make) == first
        assert len(list(storage.iterdir())) == 2
        assert in_place == []

    @pytest.mark.parametrize("run", [run_as_task, run_inline], ids=["task-run", "inline"])
    async def test_its_lifetime_is_the_tasks(
        self, credentials: AimlApiCredentials, request_: ImageRequest, storage: Path, run: StepRunner
    ) -> None:
        """`cache_expiration` ends the record in both."""
        short = generate_image.with_options(cache_expiration=timedelta(hours=1))

        await in_a_flow(lambda: run(short, request_, credentials))

        (path,) = storage.iterdir()
        ends = datetime.fromisoformat(json.loads(path.read_text())["metadata"]["expiration"].replace("Z", "+00:00"))
        assert timedelta(minutes=58) < ends - datetime.now(timezone.utc) <= timedelta(hours=1)


class TestLocks:
    """The same step at the same time is done once."""

    @pytest.mark.parametrize("runners", [[run_inline] * 20, [run_inline, run_as_task] * 5], ids=["inline", "mixed"])
    async def test_at_once_it_is_done_once(
        self, credentials: AimlApiCredentials, request_: ImageRequest, runners: list[StepRunner]
    ) -> None:
        """Everybody gets its result."""
        counted = Counted(seconds=0.2)
        results = await in_a_flow(*(partial(run, counted.task, request_, credentials) for run in runners))

        assert counted.done == 1
        assert results == [results[0]] * len(runners)

    async def test_after_an_error_the_next_one_gets_the_lock(
        self, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """At once."""
        counted = Counted(failures=1)

        async def fail_then_do() -> Any:
            with pytest.raises(ConnectionError, match="failure 1"):
                await run_inline(counted.task, request_, credentials)
            return await asyncio.wait_for(run_inline(counted.task, request_, credentials), timeout=10)

        ((result),) = await in_a_flow(fail_then_do)
        assert result["done"] == 2

    async def test_cancelled_it_frees_the_lock(self, credentials: AimlApiCredentials, request_: ImageRequest) -> None:
        """Whether it had the lock or waited for it."""
        counted = Counted(seconds=60)

        async def cancel_then_do() -> Any:
            holder, waiter = (asyncio.create_task(run_inline(counted.task, request_, credentials)) for _ in range(2))
            await counted.begun.wait()
            for each in (waiter, holder):
                each.cancel()
                await asyncio.wait([each])
                assert each.cancelled()
            counted.seconds = 0
            return await asyncio.wait_for(run_inline(counted.task, request_, credentials), timeout=10)

        (result,) = await in_a_flow(cancel_then_do)
        assert result["done"] == 2


class TestRetries:
    """Prefect's own settings of a task hold."""

    async def test_it_is_repeated_as_often_as_the_task_says(
        self, credentials: AimlApiCredentials, request_: ImageRequest, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each is logged with what it is for; the last failure is raised as it is."""
        counted = Counted(failures=9, retries=2, retry_delay_seconds=0)
        with caplog.at_level(logging.INFO), pytest.raises(ConnectionError, match="failure 3"):
            await in_a_flow(lambda: run_inline(counted.task, request_, credentials))

        assert counted.done == 3
        assert "counted failed with ConnectionError('failure 1'): retry 1 of 2 in 0 s" in caplog.text
        assert "counted failed with ConnectionError('failure 2'): retry 2 of 2 in 0 s" in caplog.text

    async def test_what_passes_within_the_retries_is_no_failure(
        self, credentials: AimlApiCredentials, request_: ImageRequest
    ) -> None:
        """And kept like any other result."""
        counted = Counted(failures=2, retries=2, retry_delay_seconds=0)
        await in_a_flow(lambda: run_inline(counted.task, request_, credentials))
        (result,) = await in_a_flow(lambda: run_as_task(counted.task, request_, credentials))

        assert result["done"] == 3

    async def test_it_waits_as_long_as_the_task_says(
        self, credentials: AimlApiCredentials, request_: ImageRequest, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The last of the delays repeats. Others get the lock meanwhile."""
        counted = Counted(failures=9, retries=3, retry_delay_seconds=[0.1, 0.3])
        held: list[float] = []

        async def time_it() -> None:
            clock = asyncio.get_running_loop()
            began = clock.time()
            with caplog.at_level(logging.INFO), pytest.raises(ConnectionError):
                await run_inline(counted.task, request_, credentials)
            held.append(clock.time() - began)

        await in_a_flow(time_it)
        assert held[0] >= 0.7
        assert [word for word in ("in 0.1 s", "in 0.3 s") if word in caplog.text] == ["in 0.1 s", "in 0.3 s"]
        assert caplog.text.count("in 0.3 s") == 2

    @pytest.mark.parametrize("colour", ["sync", "async"])
    async def test_the_tasks_condition_decides(
        self, credentials: AimlApiCredentials, request_: ImageRequest, colour: str
    ) -> None:
        """It gets the task, a run with the step's id, and the failure."""
        seen: list[tuple[Task[Any, Any], UUID, object]] = []
        steps: list[UUID] = []

        def decide(step: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
            seen.append((step, run.id, state.data))
            return len(seen) < 2

        async def decide_later(step: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
            await asyncio.sleep(0)
            return decide(step, run, state)

        @task(
            cache_policy=GENERATION,
            persist_result=True,
            retries=5,
            retry_delay_seconds=0,
            retry_condition_fn=decide if colour == "sync" else decide_later,
        )
        async def failing(request: ImageRequest, credentials: AimlApiCredentials) -> None:  # noqa: ARG001 - the key's
            steps.append(current_step().id)
            raise ConnectionError(f"failure {len(steps)}")

        with pytest.raises(ConnectionError, match="failure 2"):
            await in_a_flow(lambda: run_inline(failing, request_, credentials))

        assert [str(error) for *_, error in seen] == ["failure 1", "failure 2"]
        assert {step for step, *_ in seen} == {failing}
        assert [run for _, run, _ in seen] == steps
        assert len(set(steps)) == 1

    @pytest.mark.parametrize(("fault", "calls"), [("server_error", 2), ("moderation", 1)], ids=["passing", "final"])
    async def test_the_real_task_decides_as_in_a_run(
        self, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest, fault: str, calls: int
    ) -> None:
        """A passing fault is repeated, a refusal is not."""
        sandbox.control.inject(fault, times=1)
        await asyncio.gather(
            in_a_flow(lambda: run_inline(generate_image, request_, credentials)), return_exceptions=True
        )

        assert sandbox.control.summary().calls == calls


async def test_no_task_run_is_made(credentials: AimlApiCredentials, request_: ImageRequest) -> None:
    """The server knows of none, where the same step as a run makes one."""

    async def run_step(runner: StepRunner) -> UUID:
        await runner(Counted().task, request_, credentials)
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        return context.flow_run.id

    (inline,) = await in_a_flow(partial(run_step, run_inline))
    (as_task,) = await in_a_flow(partial(run_step, run_as_task))

    async with get_client() as client:

        async def count(flow_run: UUID) -> int:
            return len(await client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))))

        for _ in range(200):  # the server learns of task runs from events, in their order
            if await count(as_task):
                break
            await asyncio.sleep(0.05)
        assert (await count(inline), await count(as_task)) == (0, 1)


async def test_it_needs_no_flow(credentials: AimlApiCredentials, request_: ImageRequest) -> None:
    """Its result is kept all the same."""
    counted = Counted(failures=1, retries=1)
    results = [await run_inline(counted.task, request_, credentials) for _ in range(2)]

    assert [result["done"] for result in results] == [2, 2]
