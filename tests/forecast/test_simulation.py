"""The simulation against results calculated by hand, and against itself."""

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
    """Forecast a scenario with calls of one second by default."""
    return forecast(Scenario(**{"latency": SECOND, **given}))


# ------------------------------------------------------------------ by hand


@given(images=st.integers(0, 400), limit=st.integers(1, 60), seconds=st.floats(0.1, 100))
@settings(max_examples=30, deadline=None)
def test_calls_of_one_length_go_in_waves(images: int, limit: int, seconds: float) -> None:
    """The time is the number of waves that the limit requires times the latency."""
    latency = ConstantLatency(seconds=seconds)
    result = predict(images=images, max_in_flight=limit, density="steps", latency=latency)

    assert result.seconds == pytest.approx(math.ceil(images / limit) * seconds)
    assert (result.published, result.calls, result.billed_calls) == (images, images, images)


@given(images=st.integers(0, 900), limit=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_chunks_leave_slots_free_at_their_ends(images: int, limit: int) -> None:
    """Calls of equal length end three chunks of a hundred together: at most one wave is lost per 300 rows."""
    waves = math.ceil(images / limit)
    assert waves <= predict(images=images, max_in_flight=limit).seconds <= waves + images // 300


def test_workers_share_the_work() -> None:
    """Four workers have four times the slots."""
    assert predict(images=800, workers=4, max_in_flight=10).seconds == pytest.approx(20)


def test_one_limit_over_all_workers_holds() -> None:
    """Ten calls at once are the limit of all workers together."""
    result = predict(images=800, workers=4, max_in_flight=50, max_in_flight_in_all=10)
    assert result.seconds == pytest.approx(80)
    assert result.mean_in_flight == pytest.approx(10)


@pytest.mark.parametrize(("workers", "cores", "at_once"), [(1, None, 1), (4, None, 4), (4, 2, 2), (1, 2, 1)])
def test_computing_is_bound_by_cores(workers: int, cores: int | None, at_once: int) -> None:
    """With instant calls, time is CPU time: a worker uses at most one core, and all workers share the cores."""
    result = predict(
        images=400,
        workers=workers,
        cores=cores,
        cpu_seconds=0.1,
        max_in_flight=50,
        latency=ConstantLatency(seconds=0),
    )
    assert result.seconds == pytest.approx(400 * 0.1 / at_once, rel=0.01)


def test_shards_wait_for_a_worker() -> None:
    """Five runs on two workers take three rounds, each with a start and an end."""
    result = predict(
        images=50, workers=2, shard_size=10, max_in_flight=10, start_seconds=5, end_seconds=2, before_seconds=3
    )
    assert result.seconds == pytest.approx(3 + 3 * (5 + 1 + 2))


def test_retries_wait_and_are_not_billed() -> None:
    """A row whose calls all fail is recorded as failed after its retries, at no cost."""
    result = predict(images=1, failed=1, retry_delays=(2, 8, 30), retries=4)
    assert result.seconds == pytest.approx(5 * 1 + 2 + 8 + 30 + 30)
    assert (result.failed, result.calls, result.billed_calls, result.credits) == (1, 5, 0, 0)


def test_failures_may_be_quicker_than_answers() -> None:
    """An immediate 5xx costs only the retry delay."""
    assert predict(images=1, failed=1, failed_after=0, retry_delays=(2,), retries=1).seconds == pytest.approx(2)


def test_lost_answers_are_billed_and_repeated_as_often_as_allowed() -> None:
    """Repeated once by default, so two calls are paid without an image."""
    result = predict(images=1, lost=1, price=100)
    assert (result.failed, result.billed_calls, result.credits) == (1, 2, 200)


def test_flagged_images_cost_money_and_no_put() -> None:
    """They are paid, not published and not repeated."""
    result = predict(images=10, flagged=1)
    assert (result.flagged, result.published, result.billed_calls) == (10, 0, 10)
    assert result.s3_requests["PUT"] == 5


def test_a_refusal_pauses_all_calls() -> None:
    """With every second call refused and a pause of ten seconds each, a row waits ten seconds on average."""
    result = predict(images=400, max_in_flight=1, refused=0.5, retry_after=10)
    assert result.refused_calls == pytest.approx(400, rel=0.2)
    assert result.seconds == pytest.approx(400 * 1 + result.refused_calls * 10)
    assert result.billed_calls == 400


def test_a_limit_of_the_service_is_found() -> None:
    """The seven calls that the service accepts stay in use, at the price of a few refusals."""
    result = predict(images=2000, max_in_flight=50, service_in_flight=7)
    assert 0 < result.refused_calls < 0.05 * result.calls
    assert 2000 / 7 <= result.seconds < 1.15 * 2000 / 7


def test_refusals_lower_the_limit() -> None:
    """Besides its pause, a refusal costs the slots that the pacer removes."""
    result = predict(images=2000, max_in_flight=50, refused=0.02, retry_after=0)
    assert result.seconds > 1.5 * 2000 / 50


# ------------------------------------------------------------------ requests to S3


def test_s3_requests_of_an_empty_bucket() -> None:
    """One LIST, one HEAD and two PUTs an image, and six for the run."""
    assert predict(images=100).s3_requests == {"LIST": 1, "HEAD": 101, "PUT": 205}


def test_a_large_bucket_costs_a_look_up_of_each_image() -> None:
    """With more than 3,000 keys the plan stops listing after three pages."""
    assert predict(images=100, keys=5000).s3_requests == {"LIST": 3, "HEAD": 201, "PUT": 205}


def test_leases_cost_three_requests_and_their_renewals() -> None:
    """A PUT, a DELETE and a second look-up; a PUT for each third of the lease's duration."""
    result = predict(
        images=10, max_in_flight=10, lease_seconds=60, latency=ConstantLatency(seconds=45), density="steps"
    )
    assert result.s3_requests == {"LIST": 1, "HEAD": 21, "PUT": 25 + 10 * (1 + 2), "DELETE": 10}


def test_results_in_the_bucket_are_looked_up_and_stored() -> None:
    """Two an image: the results of the call and of the download."""
    result = predict(images=100, results_in_bucket=True)
    assert result.s3_requests == {"LIST": 1, "HEAD": 101, "GET": 200, "PUT": 405}


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
    """The sums add up, and equal scenarios have equal forecasts."""
    result = predict(**scenario, latency=SPREAD, price=7)

    assert result.published + result.flagged + result.failed == scenario["images"]
    assert result.published + result.flagged <= result.billed_calls <= result.calls - result.refused_calls
    assert result.credits == 7 * result.billed_calls
    assert 0 <= result.busiest_cpu <= 1.000001
    assert result.mean_in_flight <= scenario["workers"] * scenario["max_in_flight"]
    assert predict(**scenario, latency=SPREAD, price=7) == result


@given(st.integers(1, 300), st.integers(1, 30), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_a_higher_limit_never_takes_longer(images: int, limit: int, seed: int) -> None:
    """With the same calls, in steps, and no other constraint."""
    seconds = [
        predict(images=images, max_in_flight=slots, latency=SPREAD, density="steps", random_seed=seed).seconds
        for slots in (limit, limit + 1)
    ]
    assert seconds[1] <= seconds[0] + 1e-9


@given(scenarios, st.floats(0, 0.3))
@settings(max_examples=40, deadline=None)
def test_more_failures_never_cost_fewer_calls(scenario: dict[str, Any], failed: float) -> None:
    """They never publish more images either."""
    only = {"refused": 0, "lost": 0, "flagged": 0}
    before = predict(**{**scenario, **only}, latency=SPREAD)
    after = predict(**{**scenario, **only, "failed": scenario["failed"] + failed}, latency=SPREAD)
    assert after.calls >= before.calls
    assert after.published <= before.published


@given(st.integers(1, 200), st.integers(1, 20), st.floats(0.1, 10), st.floats(0, 5))
@settings(max_examples=40, deadline=None)
def test_slower_calls_never_end_sooner(images: int, limit: int, seconds: float, more: float) -> None:
    """More images never end sooner either."""
    before = predict(images=images, max_in_flight=limit, latency=ConstantLatency(seconds=seconds)).seconds
    assert (
        predict(images=images, max_in_flight=limit, latency=ConstantLatency(seconds=seconds + more)).seconds >= before
    )
    assert predict(images=images + 1, max_in_flight=limit, latency=ConstantLatency(seconds=seconds)).seconds >= before


def test_another_seed_draws_other_calls() -> None:
    """Different seeds give different forecasts."""
    result = {predict(images=50, latency=SPREAD, random_seed=seed).seconds for seed in range(5)}
    assert len(result) == 5


# ------------------------------------------------------------------ latencies


def test_lognormal_latencies_have_their_median_and_percentile() -> None:
    """Drawn latencies have the median and percentile of their setting."""
    drawn = [SPREAD.at((number + 0.5) / 10_000) for number in range(10_000)]
    assert median(drawn) == pytest.approx(8, rel=0.01)
    assert quantiles(drawn, n=20)[-1] == pytest.approx(20, rel=0.01)
    assert 0 < SPREAD.at(0.0) < SPREAD.at(1.0) < math.inf


def test_measured_latencies_come_as_often_as_they_were_measured() -> None:
    """Each has its share of ranks, in whatever order they were given."""
    measured = MeasuredLatency(seconds=(9, 1, 1, 5))
    assert [measured.at(rank) for rank in (0, 0.49, 0.5, 0.75, 1)] == [1, 1, 5, 9, 9]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"refused": 1}, "never ends"),
        ({"failed": 0.6, "lost": 0.5}, "their sum must be at most 1"),
        ({"latency": {"kind": "lognormal", "median": 8, "p95": 2}}, "less than the median"),
        ({"latency": {"kind": "measured", "seconds": []}}, "at least 1 item"),
    ],
)
def test_an_impossible_scenario_is_refused(wrong: dict[str, Any], message: str) -> None:
    """The message has the reason."""
    with pytest.raises(ValidationError, match=message):
        predict(images=1, **wrong)
