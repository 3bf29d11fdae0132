"""`flux-prefect recover`: answers that an older release could not parse."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from flux_prefect.api.answers import RawAnswer
from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.cli.app import main
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import Order, obtain
from flux_prefect.errors import Billed, InvalidResponse
from flux_prefect.host.spool import KeptAnswer, PaidCall, Spool
from flux_prefect.sandbox.launching import RunningSandbox


@pytest.fixture
def kept(credentials: AimlApiCredentials, request_: ImageRequest) -> KeptAnswer:
    """An answer of the service that was kept and not parsed, as an older release left it."""
    return keep(pay(request_, credentials), request_, credentials)


def pay(request: ImageRequest, credentials: AimlApiCredentials) -> RawAnswer:
    """The raw answer to one call."""
    answers: list[RawAnswer] = []

    async def take(answer: RawAnswer) -> None:
        answers.append(answer)

    async def call() -> None:
        async with credentials.get_client() as client:
            await client.generate(request, on_answer=take)

    asyncio.run(call())
    return answers[0]


def keep(answer: RawAnswer, request: ImageRequest, credentials: AimlApiCredentials) -> KeptAnswer:
    """Leave it in the spool, with the note of its call."""
    fingerprint = "unseeded" if request.seed is None else request.fingerprint(credentials.base_url)
    call = PaidCall(
        client_request_id="fp-1",
        fingerprint=fingerprint,
        endpoint=credentials.base_url,
        sent_at=datetime.now(timezone.utc),
        task_run_id=None,
    )
    found = KeptAnswer(call=call, request=request, answer=answer)
    Spool().open_call(call)
    Spool().leave_open(call, InvalidResponse("unknown shape", billed=Billed.YES, credits_used=168_000))
    Spool().keep_answer(found)
    return found


def recover(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status and what became of each file."""
    status = main(["recover", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)["answers"]


def test_an_answer_is_recorded_and_used_by_the_next_run(
    sandbox: RunningSandbox,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    kept: KeptAnswer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says what it was; the call is no longer open, and the file is gone from the answers."""
    status, (answer,) = recover(capsys)

    async def run_again() -> bool:
        async with credentials.get_client() as client:
            _, paid = await obtain(request_, client, Spool(), Order())
        return paid

    assert (status, answer["outcome"]) == (0, "recovered")
    assert (answer["prompt"], answer["seed"], answer["credits_used"]) == (request_.prompt, 7, 168_000)
    assert (answer["request_id"], answer["fingerprint"]) == ("fp-1", kept.call.fingerprint)
    assert [url.startswith(sandbox.url) for url in answer["images"]] == [True]
    assert not Spool().open_calls()
    assert not Spool().kept_answers(kept.call.fingerprint)
    assert not asyncio.run(run_again())
    assert sandbox.control.summary().billed_calls == 1


@pytest.mark.parametrize("seed", [7, None])
def test_an_answer_is_published(
    sandbox: RunningSandbox,
    credentials: AimlApiCredentials,
    bucket: ImageBucket,
    request_: ImageRequest,
    capsys: pytest.CaptureFixture[str],
    seed: int | None,
) -> None:
    """Also one to a request without a seed, which no later run would find."""
    request = request_.model_copy(update={"seed": seed})
    keep(pay(request, credentials), request, credentials)
    status, (answer,) = recover(capsys, "--publish", bucket.uri)
    drawn = request.model_copy(update={"seed": answer["seed"]})
    published = asyncio.run(bucket.find(drawn, answer["fingerprint"], 0))

    assert (status, answer["outcome"]) == (0, "recovered")
    assert published is not None
    assert answer["published"] == [published.uri]
    assert sandbox.control.summary().billed_calls == 1


def test_a_url_that_is_dead_is_not_paid_for_anew(
    sandbox: RunningSandbox,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    bucket: ImageBucket,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The answer is recovered, its image is not; the message says so."""
    sandbox.control.inject("dead_url", times=1)
    kept = keep(pay(request_, credentials), request_, credentials)
    status, (answer,) = recover(capsys, "--publish", bucket.uri)

    assert (status, answer["outcome"], answer["published"]) == (1, "not published", [])
    assert "URL is dead" in answer["message"]
    assert answer["request_id"] == kept.call.client_request_id
    assert sandbox.control.summary().billed_calls == 1


def test_an_answer_that_is_still_unreadable_stays(
    credentials: AimlApiCredentials, request_: ImageRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says so, with the cost; the call stays open."""
    body = json.dumps({"output": {"pictures": ["https://cdn.example/0.jpg"]}, "meta": {"usage": {"credits_used": 5}}})
    kept = keep(RawAnswer.of(body.encode(), {}), request_, credentials)
    status = main(["recover"])
    said = capsys.readouterr().out

    assert status == 1
    assert said.startswith(f"unreadable: {Spool().answer_path(kept.call)}\n")
    assert "5 credits" in said
    assert "try a newer release" in said
    assert Spool().kept_answers(kept.call.fingerprint) == [kept]
    assert [call.client_request_id for call in Spool().open_calls()] == ["fp-1"]


def test_a_later_answer_is_not_replaced(
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    kept: KeptAnswer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file from elsewhere, named by its path: the spool's own record and images stay."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "answer.json").write_text(kept.model_dump_json(), encoding="utf-8")
    Spool().drop_answer(kept.call.fingerprint, "fp-1")

    async def pay_again() -> str:
        async with credentials.get_client() as client:
            generation, _ = await obtain(request_, client, Spool(), Order())
        return generation.client_request_id

    later = asyncio.run(pay_again())
    status, (answer,) = recover(capsys, str(elsewhere))
    record = Spool().find_generation(kept.call.fingerprint)

    assert (status, answer["outcome"]) == (0, "superseded")
    assert record is not None
    assert record.client_request_id == later


def test_files_that_are_no_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named; a path without a file is a wrong argument; an empty spool is no failure."""
    (tmp_path / "notes.json").write_text("{}", encoding="utf-8")
    status, (answer,) = recover(capsys, str(tmp_path / "notes.json"))

    assert (status, answer["outcome"]) == (1, "not an answer")
    assert main(["recover", str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err
    assert recover(capsys) == (0, [])
