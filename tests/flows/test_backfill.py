"""Ranges of days: the same images as day by day, whatever the order and whatever fails."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any
from uuid import uuid4

import pytest
from prefect.utilities.callables import parameter_schema
from support.nursery import Nursery

from flux_prefect.api.models import ImageSettings
from flux_prefect.batch.days import BackfillReport
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import BackfillFailed
from flux_prefect.flows.backfill import backfill
from flux_prefect.flows.publish_daily import publish_daily
from flux_prefect.sandbox.launching import RunningSandbox

FIRST = date(2026, 3, 1)
SMALL = ImageSettings(aspect_ratio="1:1")
PRICE = 168_000


@pytest.fixture
def products() -> list[dict[str, Any]]:
    """One row of a table that no other test has."""
    return [{"id": "mug", "prompt": f"a mug of {uuid4().hex} on a {{{{ day | weekday }}}}"}]


def keys(report: BackfillReport) -> dict[date, list[str]]:
    """Where each day's images are."""
    return {
        outcome.day: [image.key for item in outcome.report.items for image in item.images]
        for outcome in report.days
        if outcome.report is not None
    }


@pytest.mark.usefixtures("prefect_server")
class TestFromPython:
    """The flow in a real Prefect run."""

    async def test_any_order_makes_the_same_images(
        self,
        products: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """Five days, the third published by its own schedule, forwards and backwards: five calls in all."""
        third = FIRST + timedelta(days=2)
        alone = await publish_daily(products, bucket, day=third, images=SMALL, credentials=credentials)
        span: dict[str, Any] = {
            "start": FIRST,
            "end": FIRST + timedelta(days=4),
            "images": SMALL,
            "credentials": credentials,
        }
        forwards = await backfill(products, bucket, **span)
        backwards = await backfill(products, bucket, order="newest first", **span)

        assert [outcome.day for outcome in backwards.days] == [FIRST + timedelta(days=n) for n in (4, 3, 2, 1, 0)]
        assert keys(forwards) == keys(backwards)
        assert keys(forwards)[third] == [alone.items[0].images[0].key]
        assert len({key for found in keys(forwards).values() for key in found}) == 5
        assert sandbox.control.summary().billed_calls == 5

    async def test_a_failed_day_never_stops_the_others(
        self, products: list[dict[str, Any]], bucket: ImageBucket, credentials: AimlApiCredentials
    ) -> None:
        """The run ends Failed and names the day."""
        bad = [{**products[0], "prompt": products[0]["prompt"] + "{% if day.day == 2 %}{{ colour }}{% endif %}"}]
        with pytest.raises(BackfillFailed, match=r"2 of 3 days published, .*; failed: 2026-03-02") as caught:
            await backfill(bad, bucket, FIRST, date(2026, 3, 3), images=SMALL, credentials=credentials)

        report = caught.value.report
        assert report.failed == [date(2026, 3, 2)]
        assert "'colour' is undefined" in report.days[1].message
        assert len(keys(report)) == 2

    async def test_the_cap_is_one_for_all_days(
        self,
        products: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
    ) -> None:
        """What a day leaves is what the next may spend; a day without room is no failure."""
        report = await backfill(
            products, bucket, FIRST, date(2026, 3, 3), images=SMALL, credentials=credentials, max_credits=2.5 * PRICE
        )

        counts = [outcome.report.counts for outcome in report.days if outcome.report is not None]
        assert counts == [{"published": 1}, {"published": 1}, {"skipped_budget": 1}]
        assert report.credits_used == 2 * PRICE
        assert sandbox.control.summary().billed_calls == 2

    async def test_a_lost_answer_counts_against_the_cap(
        self,
        products: list[dict[str, Any]],
        bucket: ImageBucket,
        credentials: AimlApiCredentials,
        sandbox: RunningSandbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """It may have been paid for, so the days after it have less."""
        monkeypatch.setenv("FLUX_PREFECT_REPEAT_UNKNOWN", "0")
        sandbox.control.inject("reset_after_work", times=1)
        with pytest.raises(BackfillFailed) as caught:
            await backfill(
                products, bucket, FIRST, date(2026, 3, 2), images=SMALL, credentials=credentials, max_credits=300_000
            )

        counts = [outcome.report.counts for outcome in caught.value.report.days if outcome.report is not None]
        assert counts == [{"failed": 1}, {"skipped_budget": 1}]
        assert sandbox.control.summary().calls == 1

    @pytest.mark.parametrize(
        ("end", "reason"), [(date(2026, 2, 28), "is before start"), (date(2062, 3, 1), "max_days is 31")]
    )
    async def test_a_slip_in_a_date_is_not_paid_for(
        self, end: date, reason: str, bucket: ImageBucket, sandbox: RunningSandbox
    ) -> None:
        """It is refused before the first day."""
        with pytest.raises(ValueError, match=reason):
            await backfill([{"prompt": "x"}], bucket, FIRST, end)
        assert sandbox.control.summary().calls == 0


def test_the_form_has_help_and_bounds() -> None:
    """What the UI builds its form from."""
    schema = parameter_schema(backfill)

    assert schema.required == ["source", "bucket", "start", "end"]
    assert all(field.get("description") for field in schema.properties.values())
    assert schema.properties["order"]["enum"] == ["oldest first", "newest first"]
    assert schema.properties["start"]["format"] == "date"


def test_from_a_shell(sandbox: RunningSandbox, bucket: ImageBucket, nursery: Nursery) -> None:
    """A day a line."""
    table = ("flows/examples/products.csv", "--bucket", bucket.uri, "--template", "a {{ name }}")
    days = ("--start", "2026-03-01", "--end", "2026-03-02", "--newest-first", "--dry-run")
    ended = nursery.run("backfill", *table, *days)

    assert ended.returncode == 0, ended.stderr
    assert "Completed: 2 of 2 days published" in ended.stdout
    assert sandbox.control.summary().calls == 0
