"""Money of a flow run that Prefect retries: one cap and one sum over all its attempts."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import State
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.utilities.callables import get_call_parameters

from flux_prefect.api.models import ImageSettings
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BackfillFailed, BatchFailed
from flux_prefect.flows.backfill import backfill
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.flows.publish_daily import publish_daily
from flux_prefect.host.spool import PaidCall
from flux_prefect.money.reconciliation import Reconciliation
from flux_prefect.sandbox.launching import RunningSandbox

PRICE = 168_000


async def run_to_its_end(
    flow: Any, *args: Any, between: Callable[[], None] = lambda: None, **options: Any
) -> State[Any]:
    """Run a flow, and again whenever Prefect has scheduled its retry, as a worker does."""
    parameters = get_call_parameters(flow.fn, args, options)
    state: State[Any] = await flow(*args, **options, return_state=True)
    async with get_client() as client:
        while state.is_scheduled():
            between()
            name = state.state_details.flow_run_id
            assert name is not None
            run = await client.read_flow_run(name)
            attempt: Any = run_flow(flow, flow_run=run, parameters=parameters, return_type="state")
            state = await attempt
    return state


pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.mark.parametrize("density", ["steps", "chunks"])
async def test_all_attempts_of_a_batch_share_its_cap_and_its_sums(
    bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox, density: Any
) -> None:
    """Three attempts, six rows, a cap of three images: three calls are billed, and every account says so."""
    rows = [{"prompt": f"a fox {uuid4().hex}", "seed": 1} for _ in range(6)]
    table = [{"id": "bad", "prompt": ""}, *rows]
    again = publish_batch.with_options(retries=2)
    state = await run_to_its_end(again, table, bucket, credentials, max_images=3, density=density)
    error = await state.aresult(raise_on_failure=False)

    assert sandbox.control.summary().billed_calls == 3
    assert isinstance(error, BatchFailed)
    report = error.report
    assert (report.calls, report.billed_calls, report.credits_used) == (3, 3, 3 * PRICE)
    assert report.counts == {"invalid": 1, "unchanged": 3, "skipped_budget": 3}
    assert state.message is not None
    assert state.message.endswith("3 calls billed, 504,000 credits ($0.25)")
    assert report.manifest is not None
    lines = (await bucket.read_path(report.manifest.removeprefix(f"{bucket.uri}/"))).splitlines()
    assert sum(json.loads(line)["credits_used"] for line in lines) == 3 * PRICE


async def test_a_call_that_was_lost_in_the_first_attempt_counts_in_the_second(
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    sandbox: RunningSandbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have been paid for: under a cap of two images, the retry sends one more call, and its report has both."""
    monkeypatch.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "0")
    sandbox.control.inject("reset_after_work", times=1)
    rows = [{"prompt": f"an owl {uuid4().hex}", "seed": 1} for _ in range(4)]
    again = publish_batch.with_options(retries=1)
    state = await run_to_its_end(again, rows, bucket, credentials, max_images=2, max_in_flight=1)
    report = await state.aresult()

    assert sandbox.control.summary().calls == 2
    assert (report.calls, report.billed_calls, report.credits_used) == (2, 2, 2 * PRICE)
    assert report.counts == {"unchanged": 1, "skipped_budget": 3}
    assert len(report.billed_and_lost) == 1


@pytest.mark.parametrize("lost", [False, True])
async def test_an_attempt_on_another_host_goes_on_under_the_cap(
    bucket: ImageBucket,
    credentials: AimlApiCredentials,
    sandbox: RunningSandbox,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lost: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """With an empty spool, it finds in the bucket what the run has spent; the log settles what was lost there."""
    monkeypatch.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "0")
    if lost:
        sandbox.control.inject("reset_after_work", times=1)
        monkeypatch.setattr("flux_prefect.batch.settlement.reconcile", _unavailable)
    rows = [{"prompt": f"a stoat {uuid4().hex}", "seed": 1} for _ in range(4)]
    table = [{"id": "bad", "prompt": ""}, *rows]
    again = publish_batch.with_options(retries=1)

    def move() -> None:
        monkeypatch.undo()
        for name, value in sandbox.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "0")
        monkeypatch.setenv("FLUX_PREFECT_SPOOL", str(tmp_path / "another-host"))

    state = await run_to_its_end(again, table, bucket, credentials, max_images=2, max_in_flight=1, between=move)
    error = await state.aresult(raise_on_failure=False)

    assert isinstance(error, BatchFailed)
    assert sandbox.control.summary().calls == 2
    assert (error.report.calls, error.report.billed_calls, error.report.credits_used) == (2, 2, 2 * PRICE)
    assert (len(error.report.billed_and_lost), error.report.possibly_billed) == (int(lost), ())
    assert sum(item.credits_used for item in error.report.items) == 2 * PRICE


async def _unavailable(*_: Any, calls: list[PaidCall], **__: Any) -> Reconciliation:
    return Reconciliation(unknown=tuple(call.client_request_id for call in calls), reason="The log is down.")


async def test_a_retried_day_goes_on_under_its_cap(
    bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """Each attempt has a subrun of its own; cap and sums are those of the day's run."""
    rows = [{"prompt": f"an elk {uuid4().hex}", "seed": 1} for _ in range(4)]
    table = [{"id": "bad", "prompt": "an elk", "seed": -1}, *rows]
    again = publish_daily.with_options(retries=1)
    state = await run_to_its_end(again, table, bucket, credentials=credentials, max_images=2)
    error = await state.aresult(raise_on_failure=False)

    assert sandbox.control.summary().billed_calls == 2
    assert isinstance(error, BatchFailed)
    assert (error.report.billed_calls, error.report.credits_used) == (2, 2 * PRICE)


async def test_all_attempts_of_a_backfill_share_its_cap_and_its_sums(
    bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """A day that fails makes Prefect try the whole backfill again: the cap is not filled anew."""
    rows = [
        {"id": "mug", "prompt": f"a mug {uuid4().hex} {{{{ day }}}}{{% if day.day == 2 %}}{{{{ no }}}}{{% endif %}}"}
    ]
    state = await run_to_its_end(
        backfill.with_options(retries=1),
        rows,
        bucket,
        date(2026, 3, 1),
        date(2026, 3, 4),
        images=ImageSettings(aspect_ratio="1:1"),
        credentials=credentials,
        max_credits=1.5 * PRICE,
    )
    error = await state.aresult(raise_on_failure=False)

    assert sandbox.control.summary().billed_calls == 1
    assert isinstance(error, BackfillFailed)
    assert error.report.credits_used == PRICE
    assert "168,000 credits" in error.report.summary()
