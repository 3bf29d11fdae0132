"""The batch flow: from Python, as a subflow, and from a shell."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr
from support.nursery import Nursery

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import (
    BalanceTooLow,
    BatchFailed,
    BucketAccessDenied,
    BucketMissing,
    SpoolUnwritable,
    TableError,
    TooFewRows,
)
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.manifest.report import BatchReport
from flux_prefect.sandbox.launching import RunningSandbox

ROOT = Path(__file__).parents[2]
COMMAND = ("publish", "batch")


class _Body(io.BytesIO):
    """A body as boto3 reads one from the network."""

    def stream(self) -> Iterator[bytes]:
        """All of it."""
        yield self.read()


@pytest.fixture
def prompts() -> list[dict[str, Any]]:
    """Three good rows of a table; no other test has them."""
    name = uuid4().hex
    return [
        {"id": "fox", "prompt": f"a fox {name}", "seed": 1, "aspect_ratio": "1:1", "shelf": "A3"},
        {"id": "owl", "prompt": f"an owl {name}", "seed": 2, "output_format": "png"},
        {"id": "elk", "prompt": f"an elk {name}", "aspect_ratio": "9:21"},
    ]


@pytest.mark.usefixtures("prefect_server")
class TestFromPython:
    """The flow called from Python, in a real Prefect run."""

    async def test_every_row_is_published_and_reported(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """The report has a record a row, in the table's order, with what it cost and where it is."""
        report = await publish_batch(prompts, bucket, credentials)

        assert isinstance(report, BatchReport)
        assert [item.id for item in report.items] == ["fox", "owl", "elk"]
        assert report.count("published") == 3
        assert report.credits_used == 3 * 168_000
        assert report.items[0].carried == {"shelf": "A3"}
        assert report.items[2].request is not None
        assert report.items[2].request.seed is not None
        for item in report.items:
            assert (await bucket.read_image(item.images[0]))[:4] in {b"\xff\xd8\xff\xe0", b"\x89PNG"}
        assert sandbox.control.summary().billed_calls == 3

    async def test_bad_rows_and_failures_never_stop_the_rest(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """An invalid row, a refused prompt and a flagged image: the good rows are published, the run is Failed."""
        refused, flagged = f"refused {uuid4().hex}", f"flagged {uuid4().hex}"
        sandbox.control.inject("moderation", times=None, prompt_contains=refused)
        sandbox.control.inject("flagged", times=None, prompt_contains=flagged)
        table = [
            *prompts[:1],
            {"id": "bad", "prompt": "x", "guidance_scale": 21},
            {"id": "refused", "prompt": refused},
            {"id": "flagged", "prompt": flagged},
            *prompts[1:],
        ]
        state = await publish_batch(table, bucket, credentials, max_failed=2, return_state=True)
        error = await state.aresult(raise_on_failure=False)

        assert state.is_failed()
        assert isinstance(error, BatchFailed)
        assert [item.status for item in error.report.items] == [
            *("published", "invalid", "failed", "flagged", "published", "published")
        ]
        assert state.message is not None
        assert state.message.startswith("3 of 6 items without their images (max_failed 2): 3 published")
        assert "guidance_scale is 21" in str(error.report.items[1].message)
        assert error.report.items[2].error == "RequestRefused"

    async def test_tolerated_failures_leave_the_run_completed(
        self, prompts: list[dict[str, Any]], bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """The state's message still reports them."""
        state = await publish_batch(
            [*prompts, {"id": "bad", "prompt": ""}], bucket, credentials, max_failed=1, return_state=True
        )

        assert state.is_completed()
        assert state.message == "3 published, 1 invalid; 3 calls billed, 504,000 credits ($0.25)"

    async def test_a_repeat_inside_the_table_is_paid_for_once(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """Every row gets its record all the same."""
        sandbox.control.settings(latency=0.2)
        report = await publish_batch([prompts[0], {**prompts[0], "id": "fox again"}], bucket, credentials)

        assert sorted(item.status for item in report.items) == ["published", "unchanged"]
        assert sandbox.control.summary().billed_calls == 1

    async def test_a_wrong_api_key_stops_the_batch(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """What every row would fail for is asked a few times, not a hundred; and nothing is billed."""
        wrong = credentials.model_copy(update={"api_key": SecretStr("wrong-key-11bb")})
        table = [{"prompt": f"{uuid4().hex}", "seed": 1} for _ in range(100)]
        with pytest.raises(BatchFailed) as caught:
            await publish_batch(table, bucket, wrong, max_in_flight=2)

        assert caught.value.report.count("failed") == 100
        assert {item.error for item in caught.value.report.items} == {"AuthenticationFailed"}
        assert sandbox.control.summary().calls <= 4
        assert sandbox.control.summary().billed_calls == 0

    async def test_no_more_calls_are_out_than_allowed(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """A service that takes three at once refuses none of a batch of three at once."""
        sandbox.control.settings(latency=0.1, max_in_flight=3)
        table = [{"prompt": uuid4().hex, "seed": 1} for _ in range(12)]
        report = await publish_batch(table, bucket, credentials, max_in_flight=3)

        assert report.count("published") == 12
        assert sandbox.control.summary().refused == 0

    async def test_a_dry_run_reports_the_plan_and_costs_nothing(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """What is there, what repeats, what is invalid, what it can cost, and what the account has."""
        await publish_batch(prompts[:1], bucket, credentials)
        table = [*prompts, {**prompts[1], "id": "owl again"}, {"id": "bad", "prompt": ""}]
        before = sandbox.control.summary()
        state = await publish_batch(table, bucket, credentials, dry_run=True, return_state=True)
        plan = (await state.aresult()).plan

        assert plan is not None
        assert plan.seconds is not None
        assert state.message is not None
        assert (plan.rows, plan.published, plan.repeats, plan.invalid, plan.requests) == (5, 1, 1, 1, 2)
        assert plan.most_credits == 2 * 168_000  # the price that the first batch was charged
        assert plan.balance == before.balance
        assert plan.seconds > 0
        assert state.message.startswith("dry run: 5 rows: 2 to generate, 1 already there, 1 repeated in the table")
        assert sandbox.control.summary() == before

    async def test_a_batch_that_the_account_cannot_pay_is_refused(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """Before the first call, with both sums; a cap that the account covers lets it begin."""
        sandbox.control.settings(balance=450_000)
        with pytest.raises(BalanceTooLow, match=r"may cost 504,000 credits .* account has 450,000 credits"):
            await publish_batch(prompts, bucket, credentials)
        assert sandbox.control.summary().calls == 0

        report = await publish_batch(prompts, bucket, credentials, max_credits=400_000)
        assert report.count("published") == 2

    @pytest.mark.parametrize("options", [{}, {"dry_run": True}])
    async def test_an_empty_table_fails(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """A failed export upstream is no quiet night: the run fails before it writes anything."""
        table = tmp_path / "export.csv"
        table.write_text("id,prompt\n", encoding="utf-8")
        with pytest.raises(TooFewRows, match=r"export\.csv.* has 0 rows and min_rows is 1: .* Nothing was sent"):
            await publish_batch(str(table), bucket, credentials, **options)
        assert await bucket.list_keys(most=10) == frozenset()

    async def test_a_shrunken_table_fails_where_more_rows_are_expected(
        self, prompts: list[dict[str, Any]], bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """min_rows is the number that the table has at least."""
        with pytest.raises(TooFewRows, match="has 2 rows and min_rows is 3"):
            await publish_batch(prompts[:2], bucket, credentials, min_rows=3)

    async def test_a_run_is_a_dry_run_only_where_asked(
        self, prompts: list[dict[str, Any]], bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """A run with nothing to do is not called one: where an empty table is allowed, or no row has failed."""
        empty = await publish_batch([], bucket, credentials, min_rows=0, return_state=True)
        assert empty.message == "0 published; 0 calls billed, 0 credits ($0.00)"
        first = await publish_batch(prompts[:1], bucket, credentials)
        assert first.manifest is not None
        again = await publish_batch(first.manifest, bucket, credentials, only="failed", return_state=True)
        assert again.message == "0 published; 0 calls billed, 0 credits ($0.00)"

    @pytest.mark.parametrize(("cap", "published"), [({"max_credits": 400_000}, 2), ({"max_images": 1}, 1)])
    async def test_what_does_not_fit_under_the_cap_is_left_for_the_next_run(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
        cap: dict[str, Any],
        published: int,
    ) -> None:
        """It is no failure; the next run publishes it and pays for nothing else."""
        table = [{**prompt, "seed": 5} for prompt in prompts]
        report = await publish_batch(table, bucket, credentials, **cap)
        assert report.count("published") == published
        assert report.count("skipped_budget") == 3 - published
        assert sandbox.control.summary().billed_calls == published

        second = await publish_batch(table, bucket, credentials)
        assert (second.count("unchanged"), second.count("published")) == (published, 3 - published)
        assert sandbox.control.summary().billed_calls == 3

    async def test_the_services_log_settles_calls_whose_answers_were_lost(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """A call that was paid for and lost is reported as billed, by its id, and no longer as possibly billed."""
        sandbox.control.inject("reset_after_work", times=1, prompt_contains=prompts[0]["prompt"])
        report = await publish_batch(prompts[:2], bucket, credentials)

        assert report.count("published") == 2
        assert (report.calls, report.billed_calls, report.unknown_calls) == (3, 3, 0)
        assert report.credits_used == sum(row.credits for row in sandbox.control.ledger().rows)
        lost = [row.client_request_id for row in sandbox.control.ledger().rows if row.billed]
        assert len(lost) == 3
        assert set(report.billed_and_lost) < set(lost)
        assert (len(report.billed_and_lost), report.possibly_billed) == (1, ())
        assert "1 billed and lost (168,000 credits ($0.08))" in str(report.reconciled)
        assert report.summary().endswith("; 3 calls billed, 504,000 credits ($0.25); 1 billed and lost")
        assert report.items[0].billed_and_lost == report.billed_and_lost
        assert sum(item.credits_used for item in report.items) == report.credits_used

    async def test_a_loss_is_reported_once(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The run that takes up the row again has its own call alone: the loss was in the report before."""
        monkeypatch.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "0")
        sandbox.control.inject("reset_after_work", times=1, prompt_contains=prompts[0]["prompt"])
        first = await publish_batch(prompts[:2], bucket, credentials, max_failed=1)
        monkeypatch.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "1")
        assert first.manifest is not None
        second = await publish_batch(first.manifest, bucket, credentials, only="failed")

        assert (len(first.billed_and_lost), first.billed_calls) == (1, 2)
        assert (second.counts, second.billed_calls, second.billed_and_lost) == ({"published": 1}, 1, ())
        assert second.items[0].billed_and_lost == ()
        assert "lost" not in second.summary()

    async def test_the_manifest_is_a_source_for_what_failed(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """Only the failed row is taken up, under its id, with its columns and the seed that was drawn for it."""
        sandbox.control.inject("moderation", times=None, prompt_contains=prompts[2]["prompt"])
        first = await publish_batch([{**prompts[2], "shelf": "B1"}, *prompts[:2]], bucket, credentials, max_failed=1)
        sandbox.control.clear_faults()
        assert first.manifest is not None
        second = await publish_batch(first.manifest, bucket, credentials, only="failed")

        (item,) = second.items
        assert (item.id, item.status, item.carried) == ("elk", "published", {"shelf": "B1"})
        assert item.request == first.items[0].request
        assert sandbox.control.summary().billed_calls == 3

    async def test_a_table_can_lie_in_the_bucket(
        self, prompts: list[dict[str, Any]], bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """Read with the bucket's own keys."""
        table = "\n".join(json.dumps(prompt) for prompt in prompts)
        await bucket.write_path("tables/prompts.jsonl", table.encode())
        report = await publish_batch(f"{bucket.uri}/tables/prompts.jsonl", bucket, credentials)

        assert [item.id for item in report.items] == ["fox", "owl", "elk"]
        assert {item.run for item in report.items} == {report.items[0].run}

    async def test_nothing_is_paid_where_the_bucket_takes_no_writes(
        self,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """Keys that may read and list alone are found out with the manifest, before the first call."""

        def refuse(**_: Any) -> AWSResponse:
            body: Any = _Body(b"<Error><Code>AccessDenied</Code></Error>")
            return AWSResponse("http://s3", 403, HTTPHeaders(), body)

        events: Any = bucket.get_client().meta.events
        events.register("before-send.s3.PutObject", refuse)
        before = sandbox.control.summary().billed_calls
        with pytest.raises(BucketAccessDenied, match="s3:PutObject"):
            await publish_batch(prompts, bucket, credentials)

        assert sandbox.control.summary().billed_calls == before

    async def test_a_rerun_of_a_published_batch_is_one_look_an_image(
        self, prompts: list[dict[str, Any]], bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """No task run, no call, one HEAD each: counted at the S3 client."""
        await publish_batch(prompts[:2], bucket, credentials)
        asked: list[str] = []
        client = bucket.get_client()
        client.meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
        report = await publish_batch(prompts[:2], bucket, credentials)

        assert report.count("unchanged") == 2
        assert [name for name in asked if name.startswith("Head")] == ["HeadBucket", "HeadObject", "HeadObject"]
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="images", Prefix=bucket.prefix)["Contents"]]
        images = [key for key in keys if "/manifests/" not in key]
        assert len(images) == 4  # two, with a record each: nothing was written again

    async def test_runs_as_a_subflow(
        self, prompts: list[dict[str, Any]], bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """The parent gets the report, and the server knows the run as its child."""

        @flow
        async def nightly() -> BatchReport:
            return await publish_batch(prompts, bucket, credentials)

        report = await nightly()
        assert report.count("published") == 3

    async def test_task_runs_are_named_and_tagged(
        self, prompts: list[dict[str, Any]], bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """In the UI each task run says what it made, and with which seed."""
        state = await publish_batch(prompts[:1], bucket, credentials, return_state=True)
        async with get_client() as client:
            for _ in range(100):
                runs = await client.read_task_runs()
                mine = [run for run in runs if run.flow_run_id == state.state_details.flow_run_id]
                if len(mine) == 3:
                    break
        label = (
            f"{str(prompts[0]['prompt'])[:47].rstrip()}… · seed 1"
            if len(prompts[0]["prompt"]) > 48
            else (f"{prompts[0]['prompt']} · seed 1")
        )
        assert {run.name for run in mine} == {f"generate {label}", f"download {label}", f"upload {label}"}

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"source": "/nowhere/prompts.csv"}, TableError, "can't be read: No such file"),
            ({"source": "prompts.xlsx"}, TableError, "neither .csv nor .jsonl"),
            ({"bucket": "images"}, ValueError, "images"),
            ({"bucket": "https://images"}, ValueError, "s3://name/prefix"),
            ({"bucket": "s3://nowhere/x"}, BucketMissing, "'nowhere' does not exist"),
        ],
    )
    async def test_what_is_wrong_as_a_whole_stops_before_paying(
        self,
        sandbox: RunningSandbox,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        change: dict[str, Any],
        error: type[Exception],
        message: str,
    ) -> None:
        """The error names what to correct, and nothing was sent."""
        arguments: dict[str, Any] = {"source": prompts, "bucket": bucket, "credentials": credentials, **change}
        with pytest.raises(error, match=message):
            await publish_batch(**arguments)
        assert sandbox.control.summary().calls == 0

    async def test_wrong_s3_keys_stop_before_paying(
        self, sandbox: RunningSandbox, prompts: list[dict[str, Any]], credentials: AimlApiCredentials
    ) -> None:
        """Found by the check of the bucket."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            with pytest.raises(BucketAccessDenied, match="check the keys"):
                await publish_batch(prompts, "s3://images/x", credentials)
        assert sandbox.control.summary().calls == 0

    async def test_an_unwritable_spool_stops_before_paying(
        self,
        sandbox: RunningSandbox,
        prompts: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An image that could not be kept is not paid for."""
        monkeypatch.setenv("FLUX_PREFECT_SPOOL", "/proc/nowhere")
        with pytest.raises(SpoolUnwritable, match="set FLUX_PREFECT_SPOOL"):
            await publish_batch(prompts, bucket, credentials)
        assert sandbox.control.summary().calls == 0

    async def test_a_bad_parameter_is_refused_before_a_run_exists(self, bucket: ImageBucket) -> None:
        """Prefect validates against the signature."""
        with pytest.raises(ParameterTypeError, match="max_in_flight"):
            await publish_batch([], bucket, max_in_flight=0)

    async def test_odd_prompts_reach_the_service_as_they_are(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, sandbox: RunningSandbox
    ) -> None:
        """Quotes, slashes, line breaks, emoji, right-to-left text: data everywhere, in no key."""
        odd = [
            f"../../etc/passwd {uuid4().hex}",
            f"\"quoted\" and 'quoted' {uuid4().hex}",
            f"🦊🎉 {uuid4().hex}",
            f"two\nlines\r\nand\ttabs {uuid4().hex}",
            f"<script>alert(1)</script> {{braces}} %s {uuid4().hex}",
            f"שלום עולם {uuid4().hex}",
            "x" * 3960 + uuid4().hex,
        ]
        report = await publish_batch([{"prompt": prompt} for prompt in odd], bucket, credentials)

        assert report.count("published") == len(odd)
        assert {row.prompt for row in sandbox.control.ledger().rows} == set(odd)
        for item in report.items:
            assert item.images[0].key.removeprefix(f"{bucket.prefix}/").replace("-0.jpg", "").isalnum()


def test_the_form_has_help_and_bounds() -> None:
    """What the UI builds its form from."""
    schema = parameter_schema(publish_batch)
    fields = schema.properties

    assert schema.required == ["source", "bucket"]
    assert (fields["max_in_flight"]["minimum"], fields["max_in_flight"]["maximum"]) == (1, 1000)
    assert all(field.get("description") for field in fields.values())
    request = schema.definitions["ImageRequest"]["properties"]
    assert request["aspect_ratio"]["anyOf"][0]["enum"][0] == "21:9"
    assert request["prompt"]["maxLength"] == 4000


class TestFromAShell:
    """`flux-prefect publish batch`, as a person or a cron job runs it."""

    @pytest.fixture
    def table(self, prompts: list[dict[str, Any]], tmp_path: Path) -> Path:
        """The three rows as a file."""
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in prompts), encoding="utf-8")
        return path

    @pytest.fixture
    def environment(self, sandbox: RunningSandbox, prefect_server: str) -> dict[str, str]:
        """What the sandbox says to export."""
        return {**os.environ, **sandbox.environment, "PREFECT_API_URL": prefect_server}

    def test_published_images_exit_with_0(
        self, table: Path, bucket: ImageBucket, nursery: Nursery, tmp_path: Path
    ) -> None:
        """Plain lines, a table of the items, a gallery that opens from disk."""
        ended = nursery.run(*COMMAND, str(table), "--bucket", bucket.uri, "--gallery", str(tmp_path / "gallery"))

        assert ended.returncode == 0, ended.stderr
        assert "Completed: 3 published; 3 calls billed, 504,000 credits ($0.25)" in ended.stdout
        assert "3 of 3 done" in ended.stderr
        assert "━" not in ended.stderr
        page = (tmp_path / "gallery" / "index.html").read_text(encoding="utf-8")
        assert page.count("<img ") == 3
        assert len(list((tmp_path / "gallery" / "images").iterdir())) == 3

    def test_failed_images_exit_with_1(
        self, table: Path, bucket: ImageBucket, nursery: Nursery, sandbox: RunningSandbox
    ) -> None:
        """The reason is on the screen."""
        sandbox.control.inject("moderation", times=1)
        ended = nursery.run(*COMMAND, str(table), "--bucket", bucket.uri)

        assert ended.returncode == 1
        assert "1 of 3 items without their images" in ended.stderr

    def test_a_missing_table_exits_with_1(self, bucket: ImageBucket, nursery: Nursery) -> None:
        """With what to correct."""
        ended = nursery.run(*COMMAND, "nowhere.csv", "--bucket", bucket.uri)

        assert ended.returncode == 1
        assert "source 'nowhere.csv' can't be read: No such file or directory" in ended.stderr

    def test_wrong_arguments_exit_with_2(self, nursery: Nursery) -> None:
        """As every command line does."""
        assert nursery.run(*COMMAND, "prompts.csv").returncode == 2

    def test_a_person_at_a_terminal_sees_a_bar(
        self, table: Path, bucket: ImageBucket, environment: dict[str, str]
    ) -> None:
        """And no log line of a single task run."""
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "flux_prefect.cli", *COMMAND, str(table), "--bucket", bucket.uri],
            cwd=ROOT,
            env={**environment, "TERM": "xterm", "COLUMNS": "120"},
            stdout=subprocess.DEVNULL,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            shown = b""
            try:
                while chunk := os.read(ours, 65536):
                    shown += chunk
            except OSError:  # the terminal ends with its last writer
                pass
        os.close(ours)

        assert process.returncode == 0
        text = shown.decode()
        assert "━" in text
        assert "3/3" in text
        assert "Finished in state" not in text


@pytest.mark.usefixtures("prefect_server")
async def test_a_list_of_requests_needs_no_table(bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """Rows are numbered from 1."""
    requests = [ImageRequest(prompt=uuid4().hex, seed=seed) for seed in (1, 2)]
    report = await publish_batch(requests, bucket, credentials)

    assert [item.id for item in report.items] == ["1", "2"]
