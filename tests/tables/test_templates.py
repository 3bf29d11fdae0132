"""Rows of templates and a day in, requests out."""

from __future__ import annotations

import json
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from flux_prefect.api.models import MAX_SEED, ImageRequest
from flux_prefect.errors import TableError, TemplateFailed
from flux_prefect.seeds import draw_day_seed
from flux_prefect.tables.table import read_table
from flux_prefect.tables.templates import DEFAULT_IMAGE_SETTINGS, ImageSettings, RowRenderer, render_table

DAY = date(2026, 3, 1)  # a Sunday
ROOT = Path(__file__).parents[2]


def render(prompt: str | None, template: str | None = None, **columns: Any) -> dict[str, Any]:
    """One row, rendered for the first of March."""
    return RowRenderer(DAY, template, DEFAULT_IMAGE_SETTINGS).render(1, {"prompt": prompt, **columns})


class TestPrompts:
    """What a template can say."""

    @pytest.mark.parametrize(
        ("prompt", "rendered"),
        [
            ("a {{ colour }} {{ name }}", "a red fox"),
            ("{{ row['shelf mark'] }}", "A3"),
            ("{{ day }}, {{ day.year }}", "2026-03-01, 2026"),
            ("{{ day | weekday }} in {{ day | month }}", "Sunday in March"),
            ("{{ day | season }}, {{ day | season('south') }}", "spring, autumn"),
            ("a{{ empty }}b", "ab"),
            ("{{ tags | join(', ') }}", "wild, small"),
            ("  {% if colour == 'red' %}warm{% endif %}\n", "warm"),
            ("{{ html }}", "<b>&amp;</b>"),
            ("{{ looks_like_one }}", "{{ colour }}"),
        ],
    )
    def test_columns_and_the_day_are_its_variables(self, prompt: str, rendered: str) -> None:
        """Text comes out as it is, and what a column holds is never a template itself."""
        columns: dict[str, Any] = {
            "colour": "red",
            "name": "fox",
            "shelf mark": "A3",
            "empty": None,
            "tags": ["wild", "small"],
            "html": "<b>&amp;</b>",
            "looks_like_one": "{{ colour }}",
        }
        assert render(prompt, **columns)["prompt"] == rendered

    def test_a_rows_own_prompt_goes_before_the_template(self) -> None:
        """The template is for rows without one."""
        assert render("own", "all: {{ name }}", name="fox")["prompt"] == "own"
        assert render("", "all: {{ name }}", name="fox")["prompt"] == "all: fox"
        assert render(None, "all: {{ name }}", name="fox")["prompt"] == "all: fox"

    @pytest.mark.parametrize(
        ("prompt", "told"),
        [
            ("{{ color }}", "'color' is undefined"),
            ("{% if color %}x{% endif %}", "'color' is undefined"),
            ("{{ row.color }}", "no attribute 'color'"),
            ("{{ colour", "line 1 of its template is broken"),
            ("{{ colour | shout }}", "No filter named 'shout'"),
            ("{{ '' }} ", "blank when rendered"),
            (None, "no prompt, and there is no template"),
            ("{{ 1 // 0 }}", "zero"),
        ],
    )
    def test_what_it_does_not_know_is_an_error(self, prompt: str | None, told: str) -> None:
        """The reason names the variable."""
        with pytest.raises(ValueError, match=told):
            render(prompt, colour="red")

    @pytest.mark.parametrize("length", [4000, 4001])
    def test_a_prompt_is_as_long_as_the_service_takes(self, length: int) -> None:
        """One character more is an error, found while it grows."""
        prompt = f"{{% for n in range({length}) %}}x{{% endfor %}}"
        if length == 4000:
            assert ImageRequest(prompt=render(prompt)["prompt"]).prompt == "x" * 4000
        else:
            with pytest.raises(ValueError, match="more than 4,000 characters"):
                render(prompt)

    @pytest.mark.parametrize(
        "prompt",
        [
            "{{ day.today() }}",
            "{{ day.fromtimestamp(0) }}",
            "{{ [1, 2] | random }}",
            "{{ lipsum() }}",
            "{{ day.strftime }}",
            "{{ name.__class__.__mro__ }}",
            "{{ tags.append('x') }}",
        ],
    )
    def test_no_clock_no_lots_and_no_way_out(self, prompt: str) -> None:
        """What would make another prompt tomorrow, or leave the sandbox, is refused."""
        with pytest.raises(ValueError, match=r"unsafe|undefined|No filter|can't be printed"):
            render(prompt, name="fox", tags=["wild"])


class TestRequests:
    """The fields beside the prompt."""

    def test_the_seed_follows_from_day_and_id(self) -> None:
        """Neither the row's place nor its prompt changes it."""
        renderer = RowRenderer(DAY, None, DEFAULT_IMAGE_SETTINGS)
        seed = renderer.render(1, {"id": " fox ", "prompt": "a"})["seed"]

        assert seed == renderer.render(9, {"id": "fox", "prompt": "b"})["seed"] == draw_day_seed(DAY, "fox")
        assert seed != renderer.render(1, {"id": "owl", "prompt": "a"})["seed"]
        assert (
            seed
            != RowRenderer(date(2026, 3, 2), None, DEFAULT_IMAGE_SETTINGS).render(1, {"id": "fox", "prompt": "a"})[
                "seed"
            ]
        )

    def test_the_seeds_of_a_day_never_change(self) -> None:
        """A rerun after an upgrade finds what was published before it."""
        assert draw_day_seed(DAY, "fox") == 721487408
        assert all(1 <= draw_day_seed(DAY, str(place)) <= MAX_SEED for place in range(100))

    def test_a_row_goes_before_the_settings(self) -> None:
        """A column named as a field fills it; an empty one leaves it to the settings."""
        images = ImageSettings(aspect_ratio="1:1", output_format="png")
        row = {"prompt": "x", "seed": "7", "aspect_ratio": "21:9", "output_format": "", "shelf": "A3"}
        rendered = RowRenderer(DAY, None, images).render(4, row)

        assert (rendered["seed"], rendered["aspect_ratio"], rendered["output_format"]) == ("7", "21:9", "png")
        assert (rendered["id"], rendered["shelf"], rendered["day"]) == ("4", "A3", "2026-03-01")

    def test_the_settings_are_those_of_a_request(self) -> None:
        """No field is missing, and none has another default or another bound."""
        ours, theirs = ImageSettings.model_fields, ImageRequest.model_fields

        assert set(ours) == set(theirs) - {"prompt", "seed"}
        for name, field in ours.items():
            assert (field.annotation, field.default) == (theirs[name].annotation, theirs[name].default)
            assert field.metadata == theirs[name].metadata


class TestTables:
    """Whole tables."""

    async def test_every_row_becomes_one_that_can_be_read(self, tmp_path: Path) -> None:
        """The example that comes along, from a file to requests."""
        target = tmp_path / "day.jsonl"
        count = await render_table(
            ROOT / "flows/examples/products.csv", DAY, target, template="a {{ colour }} {{ name }} {{ scene }}"
        )
        rows = list(read_table(target))

        assert count == len(rows) == 4
        assert all(row.error is None for row in rows)
        prompts = [row.request.prompt for row in rows if row.request is not None]
        assert prompts[0] == "a brick red stoneware mug on a kitchen table"
        assert prompts[3] == "a cream enamel kettle steaming on a Sunday morning in March"
        assert rows[0].carried["day"] == "2026-03-01"

    async def test_the_same_day_is_the_same_to_the_byte(self, tmp_path: Path) -> None:
        """Another day is not."""
        rows = [{"id": "fox", "prompt": "a fox"}]
        for name, day in {"one": DAY, "again": DAY, "next": date(2026, 3, 2)}.items():
            await render_table(rows, day, tmp_path / name)

        assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
        assert (tmp_path / "one").read_bytes() != (tmp_path / "next").read_bytes()

    async def test_all_bad_rows_are_told_at_once(self, tmp_path: Path) -> None:
        """With their numbers; of many the first, and how many there are."""
        table = tmp_path / "rows.jsonl"
        good, bad = json.dumps({"prompt": "x"}), json.dumps({"prompt": "{{ hue }}"})
        table.write_text("\n".join([good, bad, "{broken", '"text"', '{"prompt": "x", "day": 1}', *[bad] * 30]))
        with pytest.raises(TemplateFailed) as caught:
            await render_table(table, DAY, tmp_path / "day.jsonl")

        told = str(caught.value)
        assert "row 1:" not in told
        assert "row 2: its template asks for what the row has not: 'hue' is undefined" in told
        assert "row 3: line 3 is not JSON" in told
        assert "row 4: it is not an object" in told
        assert "row 5: its column 'day' would hide" in told
        assert caught.value.count == 34
        assert "… and 14 more" in told
        assert str(pickle.loads(pickle.dumps(caught.value))) == told  # noqa: S301 - as Prefect keeps it

    async def test_a_broken_template_is_told_once(self, tmp_path: Path) -> None:
        """Not a row at a time."""
        with pytest.raises(TemplateFailed, match="template: line 1") as caught:
            await render_table([{"id": 1}, {"id": 2}], DAY, tmp_path / "day.jsonl", template="{{ name")
        assert caught.value.count == 1

    async def test_a_manifest_is_no_table_of_templates(self, tmp_path: Path) -> None:
        """Its prompts are rendered already."""
        record = {"manifest": 1, "row": 1, "id": "a", "status": "failed", "carried": {}, "request": None}
        with pytest.raises(TemplateFailed, match="record of a manifest"):
            await render_table([record], DAY, tmp_path / "day.jsonl")

    async def test_a_table_that_is_not_there_is_told_as_everywhere(self, tmp_path: Path) -> None:
        """With its name."""
        with pytest.raises(TableError, match=r"nowhere\.csv"):
            await render_table("nowhere.csv", DAY, tmp_path / "day.jsonl")
