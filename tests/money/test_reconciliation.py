"""Reconciliation of lost calls with the service's log."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from flux_prefect.api.client import AimlApiClient
from flux_prefect.api.models import CREDITS_PER_USD, GeneratedImage, Generation, ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import generate
from flux_prefect.errors import AnswerLost, Billed, ServiceError
from flux_prefect.host.spool import PaidCall, Spool
from flux_prefect.money.reconciliation import MAX_PAGES, Reconciliation, reconcile
from flux_prefect.sandbox.launching import RunningSandbox

ROOT = "https://api.example"
SENT = datetime(2026, 7, 2, 3, 4, 5, tzinfo=timezone.utc)


class Log:
    """The service's log as a transport: filters by window and returns pages as the service does."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows = list(rows)
        self.requests: list[httpx.Request] = []
        self.refusals: dict[int, httpx.Response] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Return one page, or the refusal that is set for this request."""
        self.requests.append(request)
        if len(self.requests) in self.refusals:
            return self.refusals[len(self.requests)]
        start, end = (datetime.fromisoformat(request.url.params[name][:-1] + "+00:00") for name in ("start", "end"))
        rows = [row for row in self.rows if start <= datetime.fromisoformat(row["created"]) < end]
        rows.sort(key=lambda row: str(row["created"]), reverse=True)
        offset = int(request.url.params["offset"])
        return httpx.Response(200, json={"data": rows[offset : offset + 100]})


_inference_ids = itertools.count()


def row(
    name: str | None, status: str = "failed", credits_used: int = 0, at: datetime = SENT, **changes: Any
) -> dict[str, Any]:
    """Make one row of the log, as the service documents it."""
    return {
        "created": at.isoformat(),
        "status": status,
        "cost": {"usd": credits_used / CREDITS_PER_USD, "credits": credits_used},
        "inference_id": f"inf-{next(_inference_ids)}",
        "client_request_id": name,
        **changes,
    }


def note(spool: Spool, name: str, at: datetime = SENT, **changes: Any) -> PaidCall:
    """Note a call whose answer was lost in the spool."""
    call = PaidCall(
        client_request_id=name, fingerprint="f" * 32, endpoint=ROOT, sent_at=at, task_run_id=None, error="It was cut."
    ).model_copy(update=changes)
    spool.open_call(call)
    return call


@pytest.fixture
def spool() -> Spool:
    """A prepared spool."""
    spool = Spool()
    spool.prepare()
    return spool


@pytest.fixture
async def client(credentials: AimlApiCredentials) -> AsyncIterator[AimlApiClient]:
    """A client of the sandbox."""
    async with credentials.get_client() as client:
        yield client


async def reconcile_with(log: Callable[[httpx.Request], httpx.Response], spool: Spool) -> Reconciliation:
    """Reconcile all open calls with this log."""
    async with AimlApiClient(
        api_key=SecretStr("sk-test-5f0c1d7e9a"),
        base_url=ROOT,
        pacer=Pacer(1),
        transport=httpx.MockTransport(log),
    ) as client:
        return await reconcile(client, spool, calls=spool.open_calls())


async def lose(request: ImageRequest, client: AimlApiClient, spool: Spool) -> str:
    """Make a call whose answer is lost, and return its id."""
    with pytest.raises(ServiceError) as raised:
        await generate(request, client, spool)
    assert raised.value.client_request_id is not None
    return raised.value.client_request_id


class TestAgainstTheSandbox:
    """Answers that are really lost, and the sandbox's log of them."""

    @pytest.mark.parametrize("fault", ["reset_after_work", "gateway_timeout_billed", "html_200"])
    async def test_a_lost_answer_that_was_billed(
        self, fault: str, sandbox: RunningSandbox, client: AimlApiClient, spool: Spool, request_: ImageRequest
    ) -> None:
        """Is recorded as billed with its cost, and is not looked up again."""
        sandbox.control.inject(fault)
        name = await lose(request_, client, spool)
        found = await reconcile(client, spool, calls=spool.open_calls())

        price = sandbox.control.settings().price
        assert found == Reconciliation(billed={name: price})
        (call,) = spool.open_calls()
        assert (call.client_request_id, call.billed, call.credits_used) == (name, Billed.YES, price)
        assert call.error is not None
        assert call.error.endswith("The service's log shows it as billed with 168,000 credits ($0.08).")
        assert await reconcile(client, spool, calls=spool.open_calls()) == Reconciliation()
        assert spool.open_calls() == [call]

    @pytest.mark.parametrize("fault", ["reset_before_work", "gateway_timeout_unbilled"])
    async def test_a_lost_answer_that_was_not_billed(
        self, fault: str, sandbox: RunningSandbox, client: AimlApiClient, spool: Spool, request_: ImageRequest
    ) -> None:
        """Is removed from the open calls."""
        sandbox.control.inject(fault)
        name = await lose(request_, client, spool)
        assert [call.billed for call in spool.open_calls()] == [Billed.UNKNOWN]
        assert await reconcile(client, spool, calls=spool.open_calls()) == Reconciliation(not_billed=(name,))
        assert spool.open_calls() == []

    async def test_a_call_that_was_interrupted_in_flight(
        self, sandbox: RunningSandbox, client: AimlApiClient, spool: Spool, request_: ImageRequest
    ) -> None:
        """Its note has no error, as its process ended; the log settles it anyway."""
        sandbox.control.inject("hang_billed", seconds=30)
        sending = asyncio.create_task(generate(request_, client, spool))
        for _ in range(1000):
            if sandbox.control.summary().billed_calls:
                break
            await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        (call,) = spool.open_calls()
        assert (call.billed, call.error) == (Billed.UNKNOWN, None)

        found = await reconcile(client, spool, calls=[call])
        assert list(found.billed) == [call.client_request_id]
        (settled,) = spool.open_calls()
        assert settled.error is not None
        assert settled.error.startswith("Its process ended before the answer came.")

    async def test_only_the_calls_that_are_named_are_settled(
        self, sandbox: RunningSandbox, client: AimlApiClient, spool: Spool, request_: ImageRequest
    ) -> None:
        """Others may be in flight."""
        sandbox.control.inject("reset_before_work", times=2)
        await lose(request_, client, spool)
        (first,) = spool.open_calls()
        await lose(request_, client, spool)
        assert (await reconcile(client, spool, calls=[first])).not_billed == (first.client_request_id,)
        assert first not in spool.open_calls()
        assert len(spool.open_calls()) == 1

    async def test_a_call_that_never_arrived(self, client: AimlApiClient, spool: Spool) -> None:
        """Stays unknown: its row may appear later."""
        note(spool, "fp-never", at=datetime.now(timezone.utc), endpoint=client.base_url)
        before = spool.open_calls()
        assert await reconcile(client, spool, calls=before) == Reconciliation(unknown=("fp-never",))
        assert spool.open_calls() == before

    async def test_a_log_that_refuses_requests(
        self, sandbox: RunningSandbox, client: AimlApiClient, spool: Spool, request_: ImageRequest
    ) -> None:
        """Settles nothing, raises nothing, and the reason names the status."""
        sandbox.control.inject("reset_after_work")
        name = await lose(request_, client, spool)
        headers = {"Authorization": f"Bearer {sandbox.environment['AIMLAPI_KEY']}"}
        async with httpx.AsyncClient(base_url=sandbox.url, headers=headers, trust_env=False) as http:
            await asyncio.gather(*(http.get("/v2/logs", params={"period": "1h"}) for _ in range(200)))
        found = await reconcile(client, spool, calls=spool.open_calls())
        assert (found.billed, found.unknown) == ({}, (name,))
        assert found.reason is not None
        assert "429" in found.reason
        assert [call.billed for call in spool.open_calls()] == [Billed.UNKNOWN]


class TestWhatTheLogProves:
    """How the rows of the log settle a call."""

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            ([row("fp-1", "succeeded", 168_000)], Reconciliation(billed={"fp-1": 168_000})),
            ([row("fp-1", "failed", 168_000)], Reconciliation(billed={"fp-1": 168_000})),
            ([row("fp-1", "failed"), row("fp-1", "succeeded", 168_000)], Reconciliation(billed={"fp-1": 168_000})),
            ([row("fp-1", "failed")], Reconciliation(not_billed=("fp-1",))),
            ([row("fp-1", "succeeded", 0)], Reconciliation(unknown=("fp-1",))),
            ([row("fp-1", "processing")], Reconciliation(unknown=("fp-1",))),
            ([row("fp-1", "failed"), row("fp-1", "processing")], Reconciliation(unknown=("fp-1",))),
            ([row("fp-2", "succeeded", 168_000), row(None, "failed")], Reconciliation(unknown=("fp-1",))),
            ([], Reconciliation(unknown=("fp-1",))),
        ],
    )
    async def test_a_call_is_settled_by_its_own_rows(
        self, rows: list[dict[str, Any]], expected: Reconciliation, spool: Spool
    ) -> None:
        """A cost settles it in any case, a failure only if no other row contradicts it."""
        note(spool, "fp-1")
        assert await reconcile_with(Log(*rows), spool) == expected
        left = [call.billed for call in spool.open_calls()]
        assert left == ([] if expected.not_billed else [Billed.YES] if expected.billed else [Billed.UNKNOWN])

    async def test_a_success_without_any_cost_in_its_row(self, spool: Spool) -> None:
        """Is billed at an unknown cost, not at the zero of an earlier refusal."""
        note(spool, "fp-1", sends=2)
        log = Log(row("fp-1", "failed"), row("fp-1", "succeeded", cost={}))
        assert await reconcile_with(log, spool) == Reconciliation(billed={"fp-1": None})
        (call,) = spool.open_calls()
        assert (call.billed, call.credits_used) == (Billed.YES, None)
        assert call.error == "It was cut. The service's log shows it as billed."

    async def test_a_refusal_before_the_lost_send_does_not_settle_it(self, spool: Spool) -> None:
        """Its row has the same id; the call is not billed only if every send has a failed row."""
        note(spool, "fp-1", sends=2)
        log = Log(row("fp-1", "failed", at=SENT - timedelta(minutes=2)))
        assert (await reconcile_with(log, spool)).unknown == ("fp-1",)
        log.rows.append(row("fp-1", "failed"))
        assert (await reconcile_with(log, spool)).not_billed == ("fp-1",)

    async def test_a_row_that_comes_twice_counts_once(self, spool: Spool) -> None:
        """Neither its cost nor its failure counts twice."""
        note(spool, "fp-1")
        note(spool, "fp-2", sends=2)
        log = Log(*[row("fp-1", "succeeded", 168_000, inference_id="inf-a")] * 2, *[row("fp-2", inference_id="b")] * 2)
        assert await reconcile_with(log, spool) == Reconciliation(billed={"fp-1": 168_000}, unknown=("fp-2",))

    @pytest.mark.parametrize("skew", [timedelta(minutes=-10), timedelta(minutes=10)])
    async def test_a_service_whose_clock_differs(self, skew: timedelta, spool: Spool) -> None:
        """Differences of minutes in either direction are tolerated."""
        note(spool, "fp-1")
        note(spool, "fp-2")
        log = Log(row("fp-1", "succeeded", 168_000, at=SENT + skew), row("fp-2", at=SENT + skew))
        assert await reconcile_with(log, spool) == Reconciliation(billed={"fp-1": 168_000}, not_billed=("fp-2",))

    async def test_an_answer_that_is_in_the_spool(self, spool: Spool) -> None:
        """The process died between storing it and closing the call: nothing is lost, and the log is not read."""
        call = note(spool, "fp-1", error=None)
        record = Generation(
            request=ImageRequest(prompt="a lighthouse", seed=7),
            endpoint=ROOT,
            fingerprint=call.fingerprint,
            images=(GeneratedImage(index=0, url="https://cdn.example/0.jpg"),),
            seed=7,
            client_request_id="fp-1",
            created_at=SENT,
        )
        spool.keep_generation(record)
        log = Log()
        assert await reconcile_with(log, spool) == Reconciliation(kept=("fp-1",))
        assert log.requests == []
        assert spool.open_calls() == []
        assert spool.find_generation(call.fingerprint) == record

    async def test_a_record_of_another_call_proves_nothing(self, spool: Spool) -> None:
        """The same request may have been paid twice."""
        await self.test_an_answer_that_is_in_the_spool(spool)
        note(spool, "fp-2", error=None)
        assert await reconcile_with(Log(row("fp-2", "succeeded", 168_000)), spool) == Reconciliation(
            billed={"fp-2": 168_000}
        )


class TestHowTheLogIsRead:
    """Only the necessary pages of the log are read, up to a limit."""

    @pytest.mark.parametrize(
        "changes", [{"billed": Billed.YES}, {"endpoint": "https://other.example"}, {"billed": Billed.NO}]
    )
    async def test_a_call_that_cannot_or_need_not_be_settled_is_skipped(
        self, changes: dict[str, Any], spool: Spool
    ) -> None:
        """No request is sent, and its note stays unchanged."""
        call = note(spool, "fp-1", **changes)
        log = Log(row("fp-1"))
        assert await reconcile_with(log, spool) == Reconciliation()
        assert log.requests == []
        assert spool.open_calls() == [call]

    async def test_a_row_on_a_later_page_is_found(self, spool: Spool) -> None:
        """Whatever number of other calls came after it."""
        note(spool, "fp-1")
        others = [row(f"other-{number}", at=SENT + timedelta(seconds=1)) for number in range(250)]
        log = Log(*others, row("fp-1", "succeeded", 168_000))
        assert (await reconcile_with(log, spool)).billed == {"fp-1": 168_000}
        assert len(log.requests) == 3

    async def test_days_between_two_calls_are_not_read(self, spool: Spool) -> None:
        """Calls close in time share a window; the newest window is read first."""
        note(spool, "fp-1", at=SENT)
        note(spool, "fp-2", at=SENT + timedelta(minutes=20))
        note(spool, "fp-3", at=SENT + timedelta(days=100))
        log = Log(*(row(f"fp-{number}", at=call.sent_at) for number, call in enumerate(spool.open_calls(), 1)))
        assert (await reconcile_with(log, spool)).not_billed == ("fp-1", "fp-2", "fp-3")
        assert [(request.url.params["start"], request.url.params["end"]) for request in log.requests] == [
            ("2026-10-10T02:49:05Z", "2026-10-10T03:19:05Z"),
            ("2026-07-02T02:49:05Z", "2026-07-02T03:39:05Z"),
        ]

    async def test_an_endless_log_is_read_up_to_the_limit(self, spool: Spool) -> None:
        """What was found by then is settled, and the reason names the limit."""
        note(spool, "fp-1")
        note(spool, "fp-2")
        numbers = itertools.count()

        def endless(_: httpx.Request) -> httpx.Response:
            page = [{"inference_id": f"endless-{next(numbers)}"} for _ in range(99)]
            return httpx.Response(200, json={"data": [*page, row("fp-1", "succeeded", 168_000)]})

        found = await reconcile_with(endless, spool)
        assert list(found.billed) == ["fp-1"]
        assert (found.unknown, found.reason) == (("fp-2",), "The log was read for 5,000 rows and no further.")
        assert next(numbers) == MAX_PAGES * 99

    @pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
    async def test_a_log_that_cannot_be_read_settles_nothing(self, status: int, spool: Spool) -> None:
        """It is requested once, and the reason has the service's answer."""
        note(spool, "fp-1")
        before = spool.open_calls()
        log = Log(row("fp-1"))
        log.refusals = {1: httpx.Response(status, json={"message": "not now"})}
        found = await reconcile_with(log, spool)
        assert found.unknown == ("fp-1",)
        assert found.reason is not None
        assert found.reason.startswith("The log could not be read")
        assert str(status) in found.reason
        assert "not now" in found.reason
        assert len(log.requests) == 1
        assert spool.open_calls() == before

    async def test_what_was_read_before_the_log_failed_counts(self, spool: Spool) -> None:
        """A row is proof, whatever follows it."""
        note(spool, "fp-1", at=SENT + timedelta(days=1))
        note(spool, "fp-2", at=SENT)
        log = Log(row("fp-1", "succeeded", 168_000, at=SENT + timedelta(days=1)), row("fp-2"))
        log.refusals = {2: httpx.Response(429)}
        found = await reconcile_with(log, spool)
        assert (found.billed, found.unknown) == ({"fp-1": 168_000}, ("fp-2",))
        assert found.reason is not None
        assert (await reconcile_with(Log(row("fp-2")), spool)) == Reconciliation(not_billed=("fp-2",))

    async def test_a_call_that_was_settled_meanwhile_does_not_come_back(self, spool: Spool) -> None:
        """Its own process may have closed it, or another one may have settled it."""
        closed, settled = note(spool, "fp-1"), note(spool, "fp-2")
        log = Log(row("fp-1", "succeeded", 168_000), row("fp-2"))

        def meanwhile(request: httpx.Request) -> httpx.Response:
            spool.close_call(closed)
            spool.leave_open(settled, AnswerLost("known", billed=Billed.YES))
            return log(request)

        assert await reconcile_with(meanwhile, spool) == Reconciliation()
        assert [(call.client_request_id, call.error) for call in spool.open_calls()] == [("fp-2", "known")]


def test_the_summary_is_one_line() -> None:
    """It has every kind of outcome, the credits and the reason."""
    assert Reconciliation().summary() == "Calls of unknown outcome: none."
    assert Reconciliation(not_billed=("a",)).summary() == "Calls of unknown outcome: 1 not billed."
    everything = Reconciliation(
        billed={"a": 168_000, "b": None, "c": 168_000},
        not_billed=("d",),
        kept=("e",),
        unknown=("f", "g"),
        reason="The log could not be read: no.",
    )
    assert everything.summary() == (
        "Calls of unknown outcome: 3 billed and lost (336,000 credits ($0.17)), 1 not billed, 1 in the spool after "
        "all, 2 still unknown. The log could not be read: no."
    )


def test_a_note_of_an_older_version_is_read(tmp_path: Path) -> None:
    """A note without a count of sends counts as sent once."""
    spool = Spool(tmp_path)
    spool.prepare()
    call = note(spool, "fp-1")
    older = call.model_dump_json(exclude={"sends", "credits_used"})
    (tmp_path / "calls" / f"{call.fingerprint}.fp-1.json").write_text(older)
    assert spool.open_calls() == [call]
