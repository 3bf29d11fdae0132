"""Files as people have given them, each for its whole kind, in `data/tables`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flux_prefect.api.models import ImageRequest
from flux_prefect.errors import TableError
from flux_prefect.tables.prompts import render_prompts
from flux_prefect.tables.reading import Reading
from flux_prefect.tables.sources import local_source
from flux_prefect.tables.table import Row, Table, read_table

FILES = Path(__file__).parents[1] / "data" / "tables"


def read(name: str | Path) -> tuple[list[Row], Reading]:
    """The rows of a file, and how it was read."""
    table = Table(local_source(FILES / name))
    reading = table.new_reading()
    return list(table.rows(reading)), reading


@pytest.mark.parametrize(
    ("name", "rows", "passed_over"),
    [
        ("empty_rows_at_the_end.csv", [Row(1, "1", ImageRequest(prompt="a cat", seed=1))], 2),
        ("excel_export.csv", [Row(1, "1", ImageRequest(prompt="excel cat", seed=77))], 2),
    ],
)
def test_rows_without_any_content_are_no_rows(name: str, rows: list[Row], passed_over: int) -> None:
    """As spreadsheets write them below a table. The plan says how many there were."""
    read_rows, reading = read(name)
    assert read_rows == rows
    assert reading.describe()["empty rows passed over"] == str(passed_over)


def test_columns_without_name_and_content_are_no_columns() -> None:
    """As spreadsheets write them beside a table."""
    assert read("unnamed_columns.csv")[0] == [Row(1, "1", ImageRequest(prompt="a cat"))]


@pytest.mark.parametrize("name", ["semicolons.csv", "sep_line.csv"])
def test_the_delimiter_is_found(name: str) -> None:
    """The plan says which it is."""
    rows, reading = read(name)
    assert rows == [Row(1, "1", ImageRequest(prompt="a cat", seed=3))]
    assert reading.describe()["delimiter"] == "semicolon"


def test_columns_are_found_whatever_their_case() -> None:
    """The plan says what was read as what."""
    rows, reading = read("capital_header.csv")
    assert rows == [Row(1, "1", ImageRequest(prompt="a cat", seed=1))]
    assert reading.describe()["columns read"] == "ID as id, Prompt as prompt, Seed as seed"


def test_a_column_near_a_field_is_carried_through_with_a_warning() -> None:
    """It may well be what it says."""
    rows, reading = read("near_a_field.csv")
    assert rows == [Row(1, "1", ImageRequest(prompt="a cat"), {"mode": "x"})]
    assert reading.describe()["columns carried through"] == "mode"
    assert reading.warnings == ("the column 'mode' is carried through: if it is the field 'model', rename it",)


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    """Over the 128 KiB that Python's reader takes by default."""
    path = tmp_path / "long.csv"
    path.write_text("id,prompt,notes\n1,a cat," + "x" * 140_000 + "\n")
    assert read(path)[0] == [Row(1, "1", ImageRequest(prompt="a cat"), {"notes": "x" * 140_000})]


def test_whole_numbers_written_as_floats_are_whole_numbers(tmp_path: Path) -> None:
    """In CSV and Parquet, for ids, seeds and choices, as pandas writes columns with a gap."""
    request = ImageRequest(prompt="a cat", seed=7, safety_tolerance="2", num_images=1)
    assert read("whole_floats.csv")[0] == [Row(1, "1", request), Row(2, "2", ImageRequest(prompt="b"))]

    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns: dict[str, Any] = {
        "id": [12.0, None],
        "prompt": ["a cat", "b"],
        "seed": [7.0, None],
        "safety_tolerance": [2.0, None],
        "num_images": [1.0, float("nan")],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "floats.parquet")
    assert read(tmp_path / "floats.parquet")[0] == [Row(1, "12", request), Row(2, "2", ImageRequest(prompt="b"))]


def test_spaces_around_an_id_do_not_count_and_those_of_a_prompt_do() -> None:
    """A prompt is sent as it is written."""
    rows, _ = read("spaces_around.csv")
    assert [(row.id, row.request) for row in rows] == [
        ("1", ImageRequest(prompt="  a cat  ")),
        ("1", None),
    ]
    assert rows[1].error == "row 2: id '1' is already the id of row 1: ids must differ"


def test_nested_times_in_nanoseconds_are_carried_through() -> None:
    """As JSON."""
    ((row,), _) = read("nested_nanoseconds.parquet")
    assert row.error is None
    assert list(row.carried) == ["t"]
    assert list(row.carried["t"]) == ["x"]
    assert row.carried["t"]["x"].startswith("20") or row.carried["t"]["x"].startswith("19")


def test_a_null_in_a_template_is_an_error_of_its_row() -> None:
    """Before any call, with the column."""
    products = arrow_rows(FILES / "products_with_gaps.parquet")
    rendered = render_prompts(products, "a photograph of {{ name }}")
    assert next(rendered)["prompt"] == "a photograph of chair"
    with pytest.raises(TableError, match=r"Row 2 \(2\) can't be rendered: the column 'name' is empty in this row"):
        next(rendered)


def arrow_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file as Arrow has them."""
    rows: list[dict[str, Any]] = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    return rows


def test_a_seed_is_never_guessed(tmp_path: Path) -> None:
    """A number with separators or an exponent is an error that names the cell and the remedy."""
    path = tmp_path / "seeds.csv"
    path.write_text('prompt,seed\na,"1,234"\nb,1E+05\nc,7\n')
    errors = [row.error for row in read_table(path)]
    for error, cell in zip(errors, ("1,234", "1E+05"), strict=False):
        assert error is not None
        assert f"seed is '{cell}': " in error
        assert error.endswith("Write digits alone, such as 100000: no separators, no exponent")
    assert errors[2] is None


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("output_format", "JPEG", "jpeg"),
        ("output_format", "jpg", "jpeg"),
        ("aspect_ratio", " 16:9 ", "16:9"),
        ("aspect_ratio", "  ", None),
        ("guidance_scale", "NaN", None),
        ("guidance_scale", " 3.5 ", 3.5),
        ("seed", "nan", None),
        ("num_images", "2.0", 2),
        ("safety_tolerance", "5.0", "5"),
    ],
)
def test_cells_are_what_they_mean(tmp_path: Path, column: str, cell: str, value: Any) -> None:
    """Neither the case of a choice counts, nor spaces around it; empty and NaN are the default."""
    path = tmp_path / "cells.csv"
    path.write_text(f"prompt,{column}\na,{cell}\n")
    (row,) = read_table(path)
    given = {} if value is None else {column: value}
    assert row.request == ImageRequest(prompt="a", **given)


def test_nan_in_a_list_of_rows_is_an_empty_cell() -> None:
    """As `DataFrame.to_dict` writes it."""
    nan = float("nan")
    assert list(read_table([{"id": nan, "prompt": "a", "seed": nan, "note": nan}])) == [
        Row(1, "1", ImageRequest(prompt="a"), {"note": None})
    ]
