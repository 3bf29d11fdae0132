from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from flux_prefect.api.models import MAX_SEED, ImageRequest
from flux_prefect.seeds import draw_seed, with_seed

TEXT = st.text(st.characters(), max_size=30)  # half characters among them, as ids from JSON can hold


@given(run=TEXT, place=TEXT)
def test_a_seed_is_one_that_the_service_takes(run: str, place: str) -> None:
    """Every run and place has a seed within the bounds, the same each time."""
    seed = draw_seed(run, place)
    assert 1 <= seed <= MAX_SEED
    assert draw_seed(run, place) == seed


@given(one=st.tuples(TEXT, TEXT), other=st.tuples(TEXT, TEXT))
def test_another_run_or_place_draws_another_seed(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Runs and places are distinguished wherever one ends and the other begins."""
    assume(one != other)
    assert draw_seed(*one) != draw_seed(*other)


def test_the_border_between_run_and_place_counts() -> None:
    """Text that only reads the same when joined is not the same place."""
    assert len({draw_seed("a", "b/c"), draw_seed("a/b", "c"), draw_seed("", "a/b/c"), draw_seed("a/b/c", "")}) == 4


def test_the_seeds_of_a_run_never_change() -> None:
    """A retry after an upgrade finds what the first attempt paid for."""
    assert draw_seed("9f0c7d52-5f5e-4a39-9a51-0d8f6f3f6f11", "lighthouse") == 119321945


def test_a_table_of_many_rows_gets_many_seeds() -> None:
    """Rows of one run don't share images."""
    assert len({draw_seed("run", str(row)) for row in range(10_000)}) > 9_990


def test_a_given_seed_is_left_alone() -> None:
    """A request with a seed comes back itself."""
    request = ImageRequest(prompt="a lighthouse", seed=7)
    assert with_seed(request, "run", "place") is request


def test_a_missing_seed_is_drawn() -> None:
    """Only the seed is added."""
    request = ImageRequest(prompt="a lighthouse", aspect_ratio="1:1")
    seeded = with_seed(request, "run", "place")
    assert seeded.seed == draw_seed("run", "place")
    assert seeded.model_copy(update={"seed": None}) == request
