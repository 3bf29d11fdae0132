"""Rendering of prompt templates to the requests of a day."""

from __future__ import annotations

import json
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from flux_prefect.api.models import MAX_SEED, ImageRequest, ImageSettings
from flux_prefect.errors import TableError, TemplateFailed
from flux_prefect.seeds import draw_day_seed
from flux_prefect.tables.table import read_table
from flux_prefect.tables.templates import DEFAULT_IMAGE_SETTINGS, RowRenderer, render_table

DAY = date(2026, 3, 1)  # a Sunday
ROOT = Path(__file__).parents[2]


def render(prompt: str | None, template: str | None = None, **columns: Any) -> dict[str, Any]:
    """One row, rendered for the first of March."""
    return RowRenderer(DAY, template, DEFAULT_IMAGE_SETTINGS).render(1, {"prompt": prompt, **columns})


class TestPrompts:
    """The prompts of rows."""

    @pytest.mark.parametrize(
        ("prompt", "rendered"),
        [
            ("a {{ colour }} {{ name }}", "a red fox"),
            ("{{ row['shelf mark'] }}", "A3"),
            ("{{ day }}, {{ day.year }}", "2026-03-01, 2026"),
            ("{{ day | weekday }} in {{ day | month }}", "Sunday in March"),
            ("{{ day | season }}, {{ day | season('south') }}", "spring, autumn"),
            ("a{% if empty %} {{ empty }}{% endif %}b", "ab"),
            ("{{ empty | default('plain', true) }} {{ empty or 'grey' }}", "plain grey"),
            ("{% if empty is none and empty == None %}a{% endif %}{{ '' if blank == '' }}", "a"),
            ("a{{ blank }}b", "ab"),
            ("{{ 'a' if empty is defined and missing is undefined }}{{ missing | default('b') }}", "ab"),
            ("{{ tags | join(', ') }}", "wild, small"),
            ("  {% if colour == 'red' %}warm{% endif %}\n", "warm"),
            ("{{ html }}", "<b>&amp;</b>"),
            ("{{ looks_like_one }}", "{{ colour }}"),
        ],
    )
    def test_columns_and_the_day_are_variables(self, prompt: str, rendered: str) -> None:
        """Text is not escaped, and a column's value is never itself rendered as a template."""
        columns: dict[str, Any] = {
            "colour": "red",
            "name": "fox",
            "shelf mark": "A3",
            "empty": None,
            "blank": "",
            "tags": ["wild", "small"],
            "html": "<b>&amp;</b>",
            "looks_like_one": "{{ colour }}",
        }
        assert render(prompt, **columns)["prompt"] == rendered

    def test_a_rows_own_prompt_overrides_the_template(self) -> None:
        """The template is for rows without a prompt."""
        assert render("own", "all: {{ name }}", name="fox")["prompt"] == "own"
        assert render("", "all: {{ name }}", name="fox")["prompt"] == "all: fox"
        assert render(None, "all: {{ name }}", name="fox")["prompt"] == "all: fox"

    @pytest.mark.parametrize(
        ("prompt", "reason"),
        [
            ("{{ color }}", "'color' is undefined"),
            ("a {{ empty }} fox", "the column 'empty' is empty in this row: fill it"),
            ("{{ 'a ' ~ empty }}", "the column 'empty' is empty in this row"),
            ("{{ row.empty }}", "the column 'empty' is empty in this row"),
            ("{{ gap }}", "the column 'gap' is empty in this row"),
            ("{{ nested.empty }}", "the column 'empty' is empty in this row"),
            ("{{ listed | join(', ') }}", "the column 'listed' is empty in this row"),
            ("{{ empty | default('plain') }}", "the column 'empty' is empty in this row"),
            ("{% if color %}x{% endif %}", "'color' is undefined"),
            ("{{ row.color }}", "no attribute 'color'"),
            ("{{ colour", "line 1 of its template is broken"),
            ("{{ colour | shout }}", "No filter named 'shout'"),
            ("{{ '' }} ", "its rendered prompt is blank"),
            (None, "no prompt, and no template is set"),
            ("{{ 1 // 0 }}", "zero"),
        ],
    )
    def test_a_template_that_can_not_be_rendered_is_an_error(self, prompt: str | None, reason: str) -> None:
        """An unknown variable or filter is named in the message."""
        with pytest.raises(ValueError, match=reason):
            render(prompt, colour="red", empty=None, gap=float("nan"), nested={"empty": None}, listed=["a", None])

    @pytest.mark.parametrize("length", [4000, 4001])
    def test_a_prompt_has_at_most_the_services_4000_characters(self, length: int) -> None:
        """One more is an error, found during rendering."""
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
    def test_clock_randomness_and_internals_are_blocked(self, prompt: str) -> None:
        """An expression that could change the prompt from run to run, or leave the sandbox, is refused."""
        with pytest.raises(ValueError, match=r"unsafe|undefined|No filter|can't be printed"):
            render(prompt, name="fox", tags=["wild"])


class TestRequests:
    """The fields other than the prompt."""

    def test_the_seed_depends_on_day_and_id(self) -> None:
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

    def test_a_row_overrides_the_settings(self) -> None:
        """A column with a field's name sets it; where the cell is empty, the settings do."""
        images = ImageSettings(aspect_ratio="1:1", output_format="png")
        row = {"prompt": "x", "seed": "7", "aspect_ratio": "21:9", "output_format": "", "shelf": "A3"}
        rendered = RowRenderer(DAY, None, images).render(4, row)

        assert (rendered["seed"], rendered["aspect_ratio"], rendered["output_format"]) == ("7", "21:9", "png")
        assert (rendered["id"], rendered["shelf"], rendered["day"]) == ("4", "A3", "2026-03-01")

    def test_the_settings_match_the_fields_of_a_request(self) -> None:
        """No field is missing, and all have the same defaults and bounds."""
        ours, theirs = ImageSettings.model_fields, ImageRequest.model_fields

        assert set(ours) == set(theirs) - {"prompt", "seed"}
        for name, field in ours.items():
            assert (field.annotation, field.default) == (theirs[name].annotation, theirs[name].default)
            assert field.metadata == theirs[name].metadata


class TestTables:
    """Whole tables."""

    async def test_every_rendered_row_can_be_read(self, tmp_path: Path) -> None:
        """The example table, from the file to requests."""
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

    async def test_the_same_day_is_identical_to_the_byte(self, tmp_path: Path) -> None:
        """Another day differs."""
        rows = [{"id": "fox", "prompt": "a fox"}]
        for name, day in {"one": DAY, "again": DAY, "next": date(2026, 3, 2)}.items():
            await render_table(rows, day, tmp_path / name)

        assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
        assert (tmp_path / "one").read_bytes() != (tmp_path / "next").read_bytes()

    async def test_all_invalid_rows_are_reported_at_once(self, tmp_path: Path) -> None:
        """With their numbers; of many, the first twenty and the count."""
        table = tmp_path / "rows.jsonl"
        good, bad = json.dumps({"prompt": "x"}), json.dumps({"prompt": "{{ hue }}"})
        table.write_text("\n".join([good, bad, "{broken", '"text"', '{"prompt": "x", "day": 1}', *[bad] * 30]))
        with pytest.raises(TemplateFailed) as caught:
            await render_table(table, DAY, tmp_path / "day.jsonl")

        message = str(caught.value)
        assert "row 1:" not in message
        assert "row 2: its template uses a column that the row does not have: 'hue' is undefined" in message
        assert "row 3: line 3 is not JSON" in message
        assert "row 4: it is not an object" in message
        assert "row 5: its column 'day' would hide" in message
        assert caught.value.count == 34
        assert "… and 14 more" in message
        assert str(pickle.loads(pickle.dumps(caught.value))) == message  # noqa: S301 - as Prefect stores it

    async def test_a_broken_template_is_reported_once(self, tmp_path: Path) -> None:
        """Not once for each row."""
        with pytest.raises(TemplateFailed, match="template: line 1") as caught:
            await render_table([{"id": 1}, {"id": 2}], DAY, tmp_path / "day.jsonl", template="{{ name")
        assert caught.value.count == 1

    async def test_a_manifest_is_not_a_template_table(self, tmp_path: Path) -> None:
        """Its prompts are already rendered."""
        record = {"manifest": 1, "row": 1, "id": "a", "status": "failed", "carried": {}, "request": None}
        with pytest.raises(TemplateFailed, match="it is a manifest record"):
            await render_table([record], DAY, tmp_path / "day.jsonl")

    async def test_a_missing_table_is_a_table_error(self, tmp_path: Path) -> None:
        """The error has its name."""
        with pytest.raises(TableError, match=r"nowhere\.csv"):
            await render_table("nowhere.csv", DAY, tmp_path / "day.jsonl")
