"""The simulation against what can be worked out by hand, and against itself."""

from __future__ import annotations

import math
from statistics import median, quantiles
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flux_prefect.forecast.latency import ConstantLatency, LognormalLatency, MeasuredLatency
from flux_prefect.forecast.scenario import Forecast, Scenario
from flux_prefect.forecast.simulation import forecast

SECOND = ConstantLatency(seconds=1)
SPREAD = LognormalLatency(median=8, p95=20)


def predict(**given: Any) -> Forecast:
    """The forecast of a scenario, of a second a call unless told."""
    return forecast(Scenario(**{"latency": SECOND, **given}))


# ------------------------------------------------------------------ by hand


@given(images=st.integers(0, 400), limit=st.integers(1, 60), seconds=st.floats(0.1, 100))
@settings(max_examples=30, deadline=None)
def test_calls_of_one_length_go_in_waves(images: int, limit: int, seconds: float) -> None:
    """As many waves as the limit needs, each a latency long, and not a moment more."""
    latency = ConstantLatency(seconds=seconds)
    told = predict(images=images, max_in_flight=limit, density="steps", latency=latency)

    assert told.seconds == pytest.approx(math.ceil(images / limit) * seconds)
    assert (told.published, told.calls, told.billed_calls) == (images, images, images)


@given(images=st.integers(0, 900), limit=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_chunks_leave_places_empty_at_their_ends(images: int, limit: int) -> None:
    """Calls of one length end three chunks of a hundred together: at most a wave is lost for each three hundred."""
    waves = math.ceil(images / limit)
    assert waves <= predict(images=images, max_in_flight=limit).seconds <= waves + images // 300


def test_workers_share_the_work() -> None:
    """Four of them have four times the places."""
    assert predict(images=800, workers=4, max_in_flight=10).seconds == pytest.approx(20)


def test_one_limit_over_all_workers_holds() -> None:
    """Ten places are ten places, whoever has them."""
    told = predict(images=800, workers=4, max_in_flight=50, max_in_flight_in_all=10)
    assert told.seconds == pytest.approx(80)
    assert told.mean_in_flight == pytest.approx(10)


@pytest.mark.parametrize(("workers", "cores", "at_once"), [(1, None, 1), (4, None, 4), (4, 2, 2), (1, 2, 1)])
def test_computing_is_bound_by_cores(workers: int, cores: int | None, at_once: int) -> None:
    """Where calls are quick, time is CPU time: a worker has one core at most, and all of them what is there."""
    told = predict(
        images=400,
        workers=workers,
        cores=cores,
        cpu_seconds=0.1,
        max_in_flight=50,
        latency=ConstantLatency(seconds=0),
    )
    assert told.seconds == pytest.approx(400 * 0.1 / at_once, rel=0.01)


def test_shards_wait_for_a_worker() -> None:
    """Five runs over two workers are three rounds, each with its start and its end."""
    told = predict(
        images=50, workers=2, shard_size=10, max_in_flight=10, start_seconds=5, end_seconds=2, before_seconds=3
    )
    assert told.seconds == pytest.approx(3 + 3 * (5 + 1 + 2))


def test_retries_wait_and_are_not_billed() -> None:
    """A row whose every call fails is given up after its retries, for free."""
    told = predict(images=1, failed=1, retry_delays=(2, 8, 30), retries=4)
    assert told.seconds == pytest.approx(5 * 1 + 2 + 8 + 30 + 30)
    assert (told.failed, told.calls, told.billed_calls, told.credits) == (1, 5, 0, 0)


def test_failures_may_be_quicker_than_answers() -> None:
    """A 5xx that comes at once costs its delay alone."""
    assert predict(images=1, failed=1, failed_after=0, retry_delays=(2,), retries=1).seconds == pytest.approx(2)


def test_lost_answers_are_billed_and_repeated_as_often_as_allowed() -> None:
    """Once more by default, so two calls are paid for nothing."""
    told = predict(images=1, lost=1, price=100)
    assert (told.failed, told.billed_calls, told.credits) == (1, 2, 200)


def test_flagged_images_cost_money_and_no_put() -> None:
    """They are paid for, never published and never repeated."""
    told = predict(images=10, flagged=1)
    assert (told.flagged, told.published, told.billed_calls) == (10, 0, 10)
    assert told.s3_requests["PUT"] == 5


def test_a_refusal_pauses_everybody() -> None:
    """With one refusal in two and ten seconds' pause for each, a row waits ten seconds on average."""
    told = predict(images=400, max_in_flight=1, refused=0.5, retry_after=10)
    assert told.refused_calls == pytest.approx(400, rel=0.2)
    assert told.seconds == pytest.approx(400 * 1 + told.refused_calls * 10)
    assert told.billed_calls == 400


def test_a_limit_that_the_service_has_is_found() -> None:
    """Seven places of fifty are kept busy, at the price of a few refusals."""
    told = predict(images=2000, max_in_flight=50, service_in_flight=7)
    assert 0 < told.refused_calls < 0.05 * told.calls
    assert 2000 / 7 <= told.seconds < 1.15 * 2000 / 7


def test_refusals_lower_the_limit() -> None:
    """Besides its pause, a refusal costs the places that the pacer takes away."""
    told = predict(images=2000, max_in_flight=50, refused=0.02, retry_after=0)
    assert told.seconds > 1.5 * 2000 / 50


# ------------------------------------------------------------------ requests to S3


def test_s3_requests_of_an_empty_bucket() -> None:
    """One LIST, a HEAD and two PUTs an image, and six for the run."""
    assert predict(images=100).s3_requests == {"LIST": 1, "HEAD": 101, "PUT": 205}


def test_a_large_bucket_is_asked_for_each_image() -> None:
    """Over 3,000 keys the plan's list is given up after three pages."""
    assert predict(images=100, keys=5000).s3_requests == {"LIST": 3, "HEAD": 201, "PUT": 205}


def test_leases_cost_three_requests_and_their_renewals() -> None:
    """A PUT, a DELETE and a second look; a PUT each third of its time."""
    told = predict(images=10, max_in_flight=10, lease_seconds=60, latency=ConstantLatency(seconds=45), density="steps")
    assert told.s3_requests == {"LIST": 1, "HEAD": 21, "PUT": 25 + 10 * (1 + 2), "DELETE": 10}


def test_results_in_the_bucket_are_looked_for_and_kept() -> None:
    """Two of each image: of its call and of its download."""
    told = predict(images=100, results_in_bucket=True)
    assert told.s3_requests == {"LIST": 1, "HEAD": 101, "GET": 200, "PUT": 405}


# ------------------------------------------------------------------ against itself

scenarios = st.fixed_dictionaries(
    {
        "images": st.integers(1, 150),
        "workers": st.integers(1, 4),
        "max_in_flight": st.integers(1, 20),
        "failed": st.floats(0, 0.2),
        "refused": st.floats(0, 0.1),
        "lost": st.floats(0, 0.1),
        "flagged": st.floats(0, 0.1),
        "cpu_seconds": st.floats(0, 0.1),
        "density": st.sampled_from(["steps", "chunks"]),
        "random_seed": st.integers(0, 1000),
    }
)


@given(scenarios)
@settings(max_examples=40, deadline=None)
def test_every_row_has_one_end(scenario: dict[str, Any]) -> None:
    """And the money adds up; the same scenario always has the same forecast."""
    told = predict(**scenario, latency=SPREAD, price=7)

    assert told.published + told.flagged + told.failed == scenario["images"]
    assert told.published + told.flagged <= told.billed_calls <= told.calls - told.refused_calls
    assert told.credits == 7 * told.billed_calls
    assert 0 <= told.busiest_cpu <= 1.000001
    assert told.mean_in_flight <= scenario["workers"] * scenario["max_in_flight"]
    assert predict(**scenario, latency=SPREAD, price=7) == told


@given(st.integers(1, 300), st.integers(1, 30), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_more_places_never_take_longer(images: int, limit: int, seed: int) -> None:
    """With the same calls, one place more, in steps, where nothing else is in the way."""
    seconds = [
        predict(images=images, max_in_flight=places, latency=SPREAD, density="steps", random_seed=seed).seconds
        for places in (limit, limit + 1)
    ]
    assert seconds[1] <= seconds[0] + 1e-9


@given(scenarios, st.floats(0, 0.3))
@settings(max_examples=40, deadline=None)
def test_more_failures_never_cost_fewer_calls(scenario: dict[str, Any], failed: float) -> None:
    """Nor publish more images."""
    only = {"refused": 0, "lost": 0, "flagged": 0}
    before = predict(**{**scenario, **only}, latency=SPREAD)
    after = predict(**{**scenario, **only, "failed": scenario["failed"] + failed}, latency=SPREAD)
    assert after.calls >= before.calls
    assert after.published <= before.published


@given(st.integers(1, 200), st.integers(1, 20), st.floats(0.1, 10), st.floats(0, 5))
@settings(max_examples=40, deadline=None)
def test_slower_calls_never_end_sooner(images: int, limit: int, seconds: float, more: float) -> None:
    """Nor do more images."""
    before = predict(images=images, max_in_flight=limit, latency=ConstantLatency(seconds=seconds)).seconds
    assert (
        predict(images=images, max_in_flight=limit, latency=ConstantLatency(seconds=seconds + more)).seconds >= before
    )
    assert predict(images=images + 1, max_in_flight=limit, latency=ConstantLatency(seconds=seconds)).seconds >= before


def test_another_seed_draws_other_calls() -> None:
    """A forecast is one throw of the dice, and another seed another one."""
    told = {predict(images=50, latency=SPREAD, random_seed=seed).seconds for seed in range(5)}
    assert len(told) == 5


# ------------------------------------------------------------------ latencies


def test_lognormal_latencies_have_their_median_and_percentile() -> None:
    """As they were asked for."""
    drawn = [SPREAD.at((number + 0.5) / 10_000) for number in range(10_000)]
    assert median(drawn) == pytest.approx(8, rel=0.01)
    assert quantiles(drawn, n=20)[-1] == pytest.approx(20, rel=0.01)
    assert 0 < SPREAD.at(0.0) < SPREAD.at(1.0) < math.inf


def test_measured_latencies_come_as_often_as_they_were_measured() -> None:
    """Each for its share of ranks, however they were sorted."""
    measured = MeasuredLatency(seconds=(9, 1, 1, 5))
    assert [measured.at(rank) for rank in (0, 0.49, 0.5, 0.75, 1)] == [1, 1, 5, 9, 9]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"refused": 1}, "never ends"),
        ({"failed": 0.6, "lost": 0.5}, "over 1 together"),
        ({"latency": {"kind": "lognormal", "median": 8, "p95": 2}}, "less than the median"),
        ({"latency": {"kind": "measured", "seconds": []}}, "at least 1 item"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    """With the reason."""
    with pytest.raises(ValidationError, match=message):
        predict(images=1, **wrong)
