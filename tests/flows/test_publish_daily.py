"""A day's images: the same day is the same images, however often and whenever it is run."""

from __future__ import annotations

from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ParameterTypeError
from prefect.flow_engine import run_flow_async
from prefect.states import Scheduled
from prefect.utilities.callables import parameter_schema
from support.nursery import Nursery

from flux_prefect.api.models import ImageSettings
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BackfillFailed, TemplateFailed, TooFewRows
from flux_prefect.flows.backfill import backfill
from flux_prefect.flows.publish_daily import publish_daily
from flux_prefect.manifest.report import BatchReport
from flux_prefect.sandbox.launching import RunningSandbox

SUNDAY, MONDAY = date(2026, 3, 1), date(2026, 3, 2)
SMALL = ImageSettings(aspect_ratio="1:1")


@pytest.fixture
def products() -> list[dict[str, Any]]:
    """Two rows of a table that no other test has."""
    lot = uuid4().hex
    return [{"id": name, "name": name, "lot": lot, "prompt": "a {{ name }} of {{ lot }}"} for name in ("mug", "lamp")]


def keys(report: BatchReport) -> dict[str, list[str]]:
    """Where each row's images are."""
    return {item.id: [image.key for image in item.images] for item in report.items}


@pytest.mark.usefixtures("prefect_server")
class TestFromPython:
    """The flow in a real Prefect run."""

    async def test_a_day_is_paid_for_once(
        self,
        products: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """The same day again, its rows in another order: no call. Another day: new images of the same prompts."""
        first = await publish_daily(products, bucket, day=SUNDAY, images=SMALL, credentials=credentials)
        again = await publish_daily(products[::-1], bucket, day=SUNDAY, images=SMALL, credentials=credentials)
        billed = sandbox.control.summary().billed_calls
        other = await publish_daily(products, bucket, day=MONDAY, images=SMALL, credentials=credentials)

        assert first.count("published") == again.count("unchanged") == billed == 2
        assert keys(first) == keys(again)
        assert other.count("published") == 2
        assert not {key for row in keys(first).values() for key in row} & {
            key for row in keys(other).values() for key in row
        }
        assert [item.carried["day"] for item in other.items] == ["2026-03-02"] * 2

    async def test_a_row_that_cannot_be_rendered_stops_the_day_before_it_costs(
        self,
        products: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """Good rows are not sent either; the run's page names the row and the variable."""
        bad = {"id": "bad", "prompt": "a {{ colour }} mug"}
        state = await publish_daily([*products, bad], bucket, day=SUNDAY, credentials=credentials, return_state=True)

        assert state.is_failed()
        assert "row 3: its template uses a column that the row does not have: 'colour' is undefined" in str(
            state.message
        )
        with pytest.raises(TemplateFailed):
            await state.aresult()
        assert sandbox.control.summary().calls == 0

    async def test_a_late_run_makes_the_day_that_it_was_scheduled_for(
        self, products: list[dict[str, Any]], bucket: ImageBucket, sandbox: RunningSandbox
    ) -> None:
        """By the calendar of the time zone that it is given; and the run is named so."""
        parameters = {
            "source": products[:1],
            "bucket": bucket.uri,
            "timezone": "Europe/Berlin",
            "images": SMALL.model_dump(),
        }
        late: State[Any] = Scheduled(scheduled_time=datetime(2026, 2, 28, 23, 30, tzinfo=timezone.utc))
        async with get_client() as client:
            run = await client.create_flow_run(publish_daily, parameters=parameters, state=late)
            await run_flow_async(publish_daily, flow_run=run, parameters=parameters)
            name = (await client.read_flow_run(run.id)).name
        again = await publish_daily(products[:1], bucket, day=SUNDAY, images=SMALL)

        assert name == "publish 2026-03-01"
        assert again.count("unchanged") == 1
        assert sandbox.control.summary().billed_calls == 1

    async def test_an_empty_table_fails(
        self, bucket: ImageBucket, credentials: AimlApiCredentials, tmp_path: Path
    ) -> None:
        """The night on which the export failed is red; so is a day of a backfill."""
        table = tmp_path / "export.csv"
        table.write_text("id,prompt\n", encoding="utf-8")
        with pytest.raises(TooFewRows, match="min_rows is 1"):
            await publish_daily(str(table), bucket, credentials=credentials)
        with pytest.raises(BackfillFailed) as caught:
            await backfill(str(table), bucket, MONDAY, MONDAY, credentials=credentials, min_rows=5)
        assert "min_rows is 5" in caught.value.report.days[0].message

    async def test_an_unknown_time_zone_is_refused(self, bucket: ImageBucket) -> None:
        """Before the run begins."""
        with pytest.raises(ParameterTypeError, match="Europe/Berlin"):
            await publish_daily([], bucket, timezone="Europe/Atlantis")


def test_the_form_has_help_and_bounds() -> None:
    """What the UI builds its form from."""
    schema = parameter_schema(publish_daily)

    assert schema.required == ["source", "bucket"]
    assert all(field.get("description") for field in schema.properties.values())
    images = schema.definitions["ImageSettings"]["properties"]
    assert images["aspect_ratio"]["anyOf"][0]["enum"][0] == "21:9"
    assert images["num_images"]["maximum"] == 4


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--day", "2026-03-01", "--aspect-ratio", "1:1", "--dry-run"], 0, "dry run: 4 rows: 4 to generate"),
        (["--day", "yesterday"], 2, "--day"),
        (["--num-images", "5"], 2, "num_images is '5'"),
    ],
    ids=["good", "no-day", "5-images"],
)
def test_from_a_shell(
    arguments: list[str], status: int, expected: str, sandbox: RunningSandbox, bucket: ImageBucket, nursery: Nursery
) -> None:
    """The example table, with a template for the rows that have none."""
    template = "a {{ colour }} {{ name }} {{ scene }}"
    table = ("flows/examples/products.csv", "--bucket", bucket.uri, "--template", template)
    ended = nursery.run("publish", "daily", *table, *arguments)

    assert ended.returncode == status, ended.stderr
    assert expected in (ended.stdout if status == 0 else ended.stderr)
    assert sandbox.control.summary().calls == 0
