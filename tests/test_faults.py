"""Every fault of the sandbox, through the real task in a real Prefect run: state, attempts, money, message."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State

from flux_prefect.api.models import Generation, ImageRequest
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import (
    AccessRefused,
    AnswerLost,
    AuthenticationFailed,
    Billed,
    BrokenImage,
    DownloadInterrupted,
    DownloadRefused,
    EmptyGeneration,
    FluxError,
    GenerationTimedOut,
    ImageGone,
    ImageTooLarge,
    InvalidResponse,
    NotAnImage,
    NotFound,
    OutOfCredits,
    RateLimited,
    RequestRefused,
    ServerFailed,
    ServiceBusy,
    UnexpectedFormat,
    UnsafeURL,
)
from flux_prefect.host.spool import ImageFile, Spool
from flux_prefect.sandbox.faults import FAULTS
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tasks import download_image, generate_image

pytestmark = pytest.mark.usefixtures("prefect_server")

FOREVER = None
ALL_ATTEMPTS = 5  # the first and FLUX_PREFECT_RETRIES


@dataclass(frozen=True)
class Fault:
    """A fault as it is switched on, and what must come of it.

    Attributes:
        name: of the sandbox's fault.
        times: how often it strikes; None for ever.
        error: what the task run ends with; None for Completed.
        attempts: calls (or downloads) that reach the service.
        billed: calls that were billed, as the sandbox's ledger has it.
        runs: how often Prefect runs the task; None for as often as calls reach the service.
        left_open: calls that are noted as perhaps billed at the end.
        error_billed: the error's `billed` for the call that failed last.
        says: what its message says.
        arguments: of the fault.
        settings: of the account.
    """

    name: str
    times: int | None
    error: type[FluxError] | None
    attempts: int
    billed: int = 0
    runs: int | None = None
    left_open: int = 0
    error_billed: Billed = Billed.NO
    says: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.times or 'always'}"


GENERATION_FAULTS = [
    # Pacing is the client's: it waits and sends again inside one attempt of the task.
    Fault("rate_limited", 1, None, attempts=2, billed=1, runs=1, arguments={"retry_after": 1}),
    Fault("rate_limited", 1, None, attempts=2, billed=1, runs=1),
    Fault("overloaded", 1, None, attempts=2, billed=1, runs=1, arguments={"retry_after": 1}),
    Fault(
        "rate_limited",
        FOREVER,
        RateLimited,
        attempts=2,
        runs=1,
        says="max_in_flight|slow|refus",
        arguments={"retry_after": 1},
        settings={"pacing_timeout": 1.5},
    ),
    # Passing and not billed: Prefect repeats.
    Fault("overloaded", 1, None, attempts=2, billed=1),
    Fault("overloaded", FOREVER, ServiceBusy, attempts=ALL_ATTEMPTS),
    Fault("server_error", 2, None, attempts=3, billed=1),
    Fault("server_error", FOREVER, ServerFailed, attempts=ALL_ATTEMPTS),
    Fault("bad_gateway", 1, None, attempts=2, billed=1),
    # Perhaps billed: repeated once.
    Fault("gateway_timeout_unbilled", 1, None, attempts=2, billed=1, left_open=1),
    Fault("gateway_timeout_billed", 1, None, attempts=2, billed=2, left_open=1),
    Fault(
        "gateway_timeout_billed",
        FOREVER,
        GenerationTimedOut,
        attempts=2,
        billed=2,
        left_open=2,
        error_billed=Billed.UNKNOWN,
    ),
    Fault("reset_before_work", 1, None, attempts=2, billed=1, left_open=1),
    Fault("reset_after_work", FOREVER, AnswerLost, attempts=2, billed=2, left_open=2, error_billed=Billed.UNKNOWN),
    Fault(
        "hang",
        1,
        None,
        attempts=2,
        billed=1,
        left_open=1,
        settings={"read_timeout": 0.5},
        arguments={"seconds": 5},
    ),
    Fault(
        "hang_billed",
        FOREVER,
        AnswerLost,
        attempts=2,
        billed=2,
        left_open=2,
        error_billed=Billed.UNKNOWN,
        settings={"read_timeout": 0.5},
        arguments={"seconds": 5},
    ),
    Fault(
        "slow_trickle",
        1,
        None,
        attempts=2,
        billed=2,
        left_open=1,
        settings={"generation_timeout": 1},
        arguments={"seconds": 5},
    ),
    Fault("html_200", 1, None, attempts=2, billed=2, left_open=1),
    Fault("cut_json", 1, None, attempts=2, billed=2, left_open=1),
    # Billed for certain and nothing to show: not repeated.
    Fault("invalid_json", FOREVER, InvalidResponse, attempts=1, billed=1, left_open=1, error_billed=Billed.YES),
    Fault(
        "empty_list",
        FOREVER,
        EmptyGeneration,
        attempts=1,
        billed=1,
        left_open=1,
        error_billed=Billed.YES,
        says="was billed",
    ),
    Fault("null_data", FOREVER, EmptyGeneration, attempts=1, billed=1, left_open=1, error_billed=Billed.YES),
    # Refused: repeating can't help.
    Fault("moderation", FOREVER, RequestRefused, attempts=1),
    Fault("out_of_credits", FOREVER, OutOfCredits, attempts=1, says="credits"),
    Fault("forbidden", FOREVER, AccessRefused, attempts=1),
    Fault("unauthorized", FOREVER, AuthenticationFailed, attempts=1, says="AIMLAPI_KEY|api_key"),
    Fault("not_found", FOREVER, NotFound, attempts=1, says="base_url|model"),
    # Not a failure, but reported.
    Fault("wrong_seed", 1, None, attempts=1, billed=1),
]

DOWNLOAD_FAULTS = [
    Fault("dead_url", FOREVER, ImageGone, attempts=1),
    Fault("gone_403", FOREVER, DownloadRefused, attempts=1),
    Fault("cut_download", 1, None, attempts=2),
    Fault("cut_download", FOREVER, DownloadInterrupted, attempts=ALL_ATTEMPTS),
    Fault("reset_download", 1, None, attempts=2),
    Fault("stall_download", 1, None, attempts=2, settings={"download_timeout": 0.5}, arguments={"seconds": 5}),
    Fault("download_503", 1, None, attempts=2),
    Fault("html_download", FOREVER, NotAnImage, attempts=ALL_ATTEMPTS, says="HTML"),
    Fault("corrupt_download", FOREVER, BrokenImage, attempts=2, says="twice with the same bytes"),
    Fault("truncated_image", 1, None, attempts=2),
    Fault("wrong_type", FOREVER, UnexpectedFormat, attempts=1, says="is kept as"),
    Fault("huge_download", FOREVER, ImageTooLarge, attempts=1),
    Fault("bomb", FOREVER, ImageTooLarge, attempts=1, says="pixels"),
    Fault("redirect_loop", FOREVER, UnsafeURL, attempts=1, says="redirect"),
    Fault("redirect_private", FOREVER, UnsafeURL, attempts=1),
]


def test_every_fault_of_the_sandbox_is_tried() -> None:
    """A new one needs its row here, or its test of what becomes of the image in test_pipeline."""
    elsewhere = {"flagged", "black", "fewer_images"}
    assert {fault.name for fault in (*GENERATION_FAULTS, *DOWNLOAD_FAULTS)} | elsewhere == set(FAULTS)


@flow
async def generate(request: ImageRequest, credentials: AimlApiCredentials) -> Generation:
    """The generating task inside a flow run, which ends as the task does."""
    return await generate_image(request, credentials)


@flow
async def generate_and_download(request: ImageRequest, credentials: AimlApiCredentials) -> ImageFile:
    """The downloading task behind a generation; the flow run ends as the download does."""
    generation = await generate_image(request, credentials)
    return await download_image(generation, credentials)


@pytest.mark.parametrize("fault", GENERATION_FAULTS, ids=str)
async def test_a_fault_of_the_generation(
    fault: Fault, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Ends as it should, after as many calls as it should, and says what it cost."""
    sandbox.control.inject(fault.name, times=fault.times, **fault.arguments)
    state = await generate(request_, credentials.model_copy(update=fault.settings), return_state=True)

    summary = sandbox.control.summary()
    await _check_end(fault, state, fault.error_billed)
    assert (summary.calls, summary.billed_calls) == (fault.attempts, fault.billed)
    assert await _count_runs(state, "generate-image") == (fault.attempts if fault.runs is None else fault.runs)
    assert len(Spool().open_calls()) == fault.left_open


@pytest.mark.parametrize("fault", DOWNLOAD_FAULTS, ids=str)
async def test_a_fault_of_the_download(
    fault: Fault, sandbox: RunningSandbox, credentials: AimlApiCredentials, request_: ImageRequest
) -> None:
    """Never pays again, never leaves half an image, and keeps a whole one that is not as it was asked for."""
    sandbox.control.inject(fault.name, times=fault.times, **fault.arguments)
    state = await generate_and_download(request_, credentials.model_copy(update=fault.settings), return_state=True)

    summary = sandbox.control.summary()
    await _check_end(fault, state, Billed.YES)
    assert (summary.downloads, summary.billed_calls) == (fault.attempts, 1)
    assert await _count_runs(state, "download-image") == fault.attempts
    kept = [path.suffix for path in (Spool().root / "pictures").iterdir()]
    rejected = fault.error in {UnexpectedFormat, BrokenImage}
    assert kept == ([".rejected"] if rejected else [".jpg"] if fault.error is None else [])


async def _check_end(fault: Fault, state: State[Any], error_billed: Billed) -> None:
    result = await state.aresult(raise_on_failure=False)
    if fault.error is None:
        assert state.is_completed(), result
        return
    assert state.is_failed()
    assert type(result) is fault.error
    assert result.billed is error_billed
    assert re.search(fault.says, result.message)


async def _count_runs(state: State[Any], task: str) -> int:
    """How often Prefect ran the task, as its UI shows it; the server hears of it a moment later."""
    async with get_client() as client:
        for _ in range(200):
            runs = await client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
            )
            for run in runs:
                if run.name.startswith(task.partition("-")[0]) and run.state is not None and run.state.is_final():
                    return run.run_count
            await asyncio.sleep(0.05)
    raise AssertionError(f"the server never heard of the end of {task}")
