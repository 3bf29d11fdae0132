from __future__ import annotations

import importlib
import json
import sys
import uuid
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flux_prefect.api.models import ImageRequest
from flux_prefect.errors import TableError
from flux_prefect.tables.sources import local_source
from flux_prefect.tables.table import Row, Table, open_table, read_table

pyarrow = importlib.import_module("pyarrow")
parquet = importlib.import_module("pyarrow.parquet")


def _csv(folder: Path, content: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _read(folder: Path, content: str | bytes, name: str = "table.csv") -> list[Row]:
    return list(read_table(_csv(folder, content, name)))


def _jsonl(folder: Path, *lines: object) -> list[Row]:
    return _read(folder, "\n".join(json.dumps(line) for line in lines), "table.jsonl")


def _parquet(folder: Path, **columns: Any) -> Path:
    path = folder / "table.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=700)
    return path


def _record(row: int, status: str = "published", **changes: Any) -> dict[str, Any]:
    """A line of a manifest."""
    record = {
        "manifest": 1,
        "row": row,
        "id": f"id-{row}",
        "status": status,
        "request": ImageRequest(prompt=f"a boat {row}", seed=row).model_dump(mode="json"),
        "message": None,
        "carried": {"sku": f"{row:03}"},
        "run": "run-1",
    }
    return record | changes


def _prompts(rows: list[Row]) -> list[str | None]:
    return [None if row.request is None else row.request.prompt for row in rows]


class TestCsv:
    """Tables of comma-separated values."""

    def test_a_row_is_a_request(self, tmp_path: Path) -> None:
        """Every field of a request can be a column; empty cells are the field's default."""
        header = "id,prompt,seed,aspect_ratio,output_format,guidance_scale,safety_tolerance,num_images,model\n"
        full = "dusk,a lighthouse,7,1:1,png,3.5,5,2,flux/kontext-pro/text-to-image\n"
        rows = _read(tmp_path, f"{header}{full},a boat,,,,,,,\n")
        assert rows[0] == Row(
            1,
            "dusk",
            ImageRequest(
                prompt="a lighthouse",
                seed=7,
                aspect_ratio="1:1",
                output_format="png",
                guidance_scale=3.5,
                safety_tolerance="5",
                num_images=2,
                model="flux/kontext-pro/text-to-image",
            ),
        )
        assert rows[1] == Row(2, "2", ImageRequest(prompt="a boat"))

    def test_only_the_prompt_is_needed(self, tmp_path: Path) -> None:
        """A row without an id is identified by its number."""
        assert [(row.number, row.id) for row in _read(tmp_path, "prompt\na\nb\n")] == [(1, "1"), (2, "2")]

    def test_spreadsheet_exports_are_read(self, tmp_path: Path) -> None:
        """With byte order marks, carriage returns, quotes, commas, line breaks in cells, and blank lines."""
        content = '\ufeffid,prompt\r\n1,"a ""red"", big\r\nboat"\r\n\r\n2,plain\r\n'
        assert _prompts(_read(tmp_path, content)) == ['a "red", big\r\nboat', "plain"]

    def test_a_prompt_is_kept_byte_for_byte(self, tmp_path: Path) -> None:
        """Spaces, markup, paths and formulas in a prompt are not interpreted."""
        prompts = [
            "  two  spaces ",
            "🗝️ Ünï côde\u2028",
            "../../etc/passwd",
            "<b>&amp;</b> {x} %s $HOME",
            "=SUM(A1)",
            "a\tb\nc",
        ]
        lines = "".join(f'"{prompt}"\n' for prompt in prompts)
        assert _prompts(_read(tmp_path, f"prompt\n{lines}")) == prompts

    def test_other_columns_are_carried_unchanged(self, tmp_path: Path) -> None:
        """They are not part of the request."""
        (row,) = _read(tmp_path, "sku,prompt,note\n 007 ,a boat,\n")
        assert row.carried == {"sku": " 007 ", "note": ""}
        assert row.request == ImageRequest(prompt="a boat")

    def test_spaces_around_a_columns_name_are_ignored(self, tmp_path: Path) -> None:
        """As in headers written by hand."""
        (row,) = _read(tmp_path, "id , prompt, seed\nx,a boat,3\n")
        assert (row.id, row.request) == ("x", ImageRequest(prompt="a boat", seed=3))

    @pytest.mark.parametrize(("cell", "seed"), [("42", 42), ("42.0", 42), (" 42", 42), ("4294967295", 2**32 - 1)])
    def test_a_seed_can_have_a_decimal_point(self, tmp_path: Path, cell: str, seed: int) -> None:
        """As spreadsheets write whole numbers."""
        (row,) = _read(tmp_path, f"prompt,seed\na,{cell}\n")
        assert row.request == ImageRequest(prompt="a", seed=seed)

    def test_a_ragged_row_is_invalid_and_the_next_is_read(self, tmp_path: Path) -> None:
        """The error has the row, the line and the remedy."""
        rows = _read(tmp_path, 'id,prompt\n1,"a\nb"\n2,red, big\n3\n4,c\n')
        assert _prompts(rows) == ["a\nb", None, None, "c"]
        assert rows[1].error is not None
        assert rows[1].error.startswith("row 2: line 4 has 3 cells, but the header has 2")
        assert "double quotes" in rows[1].error
        assert rows[2].error is not None
        assert rows[2].error.startswith("row 3: line 5 has 1 cells")

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"", "is empty"),
            (b"\n\nprompt\na\n", "is empty"),
            (b"\xef\xbb\xbf", "is empty"),
            (b",,\n", "is empty"),
            ("prompt\nпривет, мир\n".encode("cp1251"), "line 2: it is not UTF-8 text.*save it as UTF-8"),
            ("prompt\na\nein Schiff für dich\n".encode("cp850"), "line 3: it is not UTF-8 text"),
            ("prompt\nzażółć gęślą jaźń\n".encode("cp1250"), "line 2: it is not UTF-8 text"),
            (b"prompt\na\0b\n", "has NUL bytes"),
            (b'prompt\n"a\n', "line 2: broken CSV .*close it with a quote"),
            (b'prompt\n"a\nb\n', "lines 2 to 3: broken CSV .*close it with a quote"),
            (b'prompt\n"a"b\n', "line 2: broken CSV .*write each quote inside of it twice"),
            (b"prompt\n" + b"x" * (16 * 1024 * 1024 + 1) + b"\n", "line 2: broken CSV"),
            (b"id,text\n1,a\n", "has no column 'prompt' among its columns id, text"),
            (b"prompt,note,note\na,b,c\n", "column 'note' twice"),
            (b"prompt,prompt\na,b\n", "column 'prompt' twice"),
        ],
    )
    def test_a_broken_table_is_refused(self, tmp_path: Path, content: bytes, complaint: str) -> None:
        """The error has the file's name, the reason and the remedy."""
        with pytest.raises(TableError, match=complaint) as refusal:
            _read(tmp_path, content)
        assert "table.csv" in str(refusal.value)

    @pytest.mark.parametrize("column", ["Prompt", " PROMPT ", "prompt"])
    def test_the_case_of_a_columns_name_does_not_count(self, tmp_path: Path, column: str) -> None:
        """As in headers of spreadsheets."""
        rows = _read(tmp_path, f"ID,{column},Aspect Ratio,Guidance-Scale\nx,a,1:1,3\n")
        assert rows == [Row(1, "x", ImageRequest(prompt="a", aspect_ratio="1:1", guidance_scale=3))]

    @pytest.mark.parametrize(
        ("header", "pair"), [("prompt,Prompt", "'prompt' and 'Prompt'"), ("prompt,Seed,SEED", "'Seed' and 'SEED'")]
    )
    def test_two_columns_for_one_field_are_refused(self, tmp_path: Path, header: str, pair: str) -> None:
        """Which of them is meant can't be known."""
        with pytest.raises(TableError, match=f"the columns {pair} are both the field .*: rename one"):
            _read(tmp_path, f"{header}\na,1,2\n")

    def test_a_table_without_prompts_is_told_which_columns_it_has(self, tmp_path: Path) -> None:
        """One of them is to be renamed."""
        with pytest.raises(TableError, match="no column 'prompt' among its columns id, promt: rename the column"):
            _read(tmp_path, "id,promt\n1,a\n")

    def test_a_header_without_rows_is_an_empty_table(self, tmp_path: Path) -> None:
        """It is not an error."""
        assert _read(tmp_path, "id,prompt\n") == []

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
    @given(
        header=st.sampled_from(["", "prompt\n", "id,prompt,seed\n", "id,prompt,note\r\n"]),
        content=st.text(max_size=200),
    )
    def test_any_text_is_rows_or_a_table_error(self, tmp_path: Path, header: str, content: str) -> None:
        """No other exception is raised, whatever the file contains."""
        try:
            rows = _read(tmp_path, (header + content).encode("utf-8", errors="surrogatepass"))
        except TableError:
            return
        assert all((row.request is None) == (row.error is not None) for row in rows)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
    @given(name=st.sampled_from(["table.csv", "table.jsonl", "table.parquet"]), content=st.binary(max_size=200))
    def test_any_bytes_are_rows_or_a_table_error(self, tmp_path: Path, name: str, content: bytes) -> None:
        """In every format, also where they are not text."""
        with suppress(TableError):
            _read(tmp_path, content, name)


class TestInvalidRows:
    """Rows that are not valid requests."""

    @pytest.mark.parametrize(
        ("column", "cell"),
        [
            ("seed", "0"),
            ("seed", "-1"),
            ("seed", "4294967296"),
            ("seed", "1.5"),
            ("seed", "seven"),
            ("aspect_ratio", "5:4"),
            ("output_format", "gif"),
            ("guidance_scale", "0.5"),
            ("guidance_scale", "21"),
            ("guidance_scale", "inf"),
            ("safety_tolerance", "0"),
            ("safety_tolerance", "7"),
            ("num_images", "0"),
            ("num_images", "5"),
            ("model", "dall-e"),
            ("prompt", "   "),
            ("prompt", "x" * 4001),
        ],
    )
    def test_a_value_out_of_bounds_is_named(self, tmp_path: Path, column: str, cell: str) -> None:
        """The error has the row, the column and the value, and stays short; the rows around it are valid."""
        if column == "prompt":
            rows = _read(tmp_path, f"prompt\ngood\n{cell}\ngood\n")
        else:
            rows = _read(tmp_path, f"prompt,{column}\ngood,\nbad,{cell}\ngood,\n")
        assert [row.error is None for row in rows] == [True, False, True]
        error = rows[1].error
        assert error is not None
        assert error.replace("'", "").startswith(f"row 2: {column} is {cell[:40]}")
        assert len(error) < 300

    def test_every_problem_of_a_row_is_reported(self, tmp_path: Path) -> None:
        """So that a row can be corrected in one go."""
        (row,) = _read(tmp_path, "id,prompt,seed,num_images\nx,,0,9\n")
        assert row.error is not None
        assert row.error.startswith("row 1: prompt is missing; seed is '0': ")
        assert "; num_images is '9': " in row.error
        assert row.id == "x"

    def test_the_longest_prompt_is_valid(self, tmp_path: Path) -> None:
        """4,000 characters are allowed, however many bytes they take."""
        (row,) = _read(tmp_path, "prompt\n" + "🗝" * 4000 + "\n")
        assert row.error is None

    def test_an_invalid_row_keeps_its_id_and_its_other_columns(self, tmp_path: Path) -> None:
        """So that the report can be joined with the table."""
        (row,) = _read(tmp_path, "id,prompt,seed,sku\nx,a,0,007\n")
        assert (row.id, row.carried, row.request) == ("x", {"sku": "007"}, None)

    def test_a_second_row_with_an_id_is_invalid(self, tmp_path: Path) -> None:
        """The error names both rows; the first stays valid."""
        rows = _read(tmp_path, "id,prompt,sku\nx,a,1\ny,b,2\n x ,c,3\n")
        assert [row.error is None for row in rows] == [True, True, False]
        assert rows[2].error == "row 3: id 'x' is already the id of row 1: ids must differ"
        assert (rows[2].id, rows[2].carried) == ("x", {"sku": "3"})

    def test_a_rows_number_is_an_id_too(self, tmp_path: Path) -> None:
        """An id that equals the number of a row without an id is a repetition."""
        rows = _read(tmp_path, "id,prompt\n2,a\n,b\n")
        assert rows[1].error == "row 2: id '2' is already the id of row 1: ids must differ"


class TestJsonLines:
    """Tables of JSON objects, one on each line."""

    def test_values_have_their_own_types(self, tmp_path: Path) -> None:
        """Numbers are numbers; null and empty text are the field's default."""
        rows = _jsonl(
            tmp_path,
            {"id": 7, "prompt": "a\nb", "seed": 3, "guidance_scale": 2.5, "num_images": 2},
            {"id": None, "prompt": "c", "seed": None, "aspect_ratio": ""},
        )
        assert rows[0] == Row(1, "7", ImageRequest(prompt="a\nb", seed=3, guidance_scale=2.5, num_images=2))
        assert rows[1] == Row(2, "2", ImageRequest(prompt="c"))

    def test_safety_tolerance_can_be_a_number(self, tmp_path: Path) -> None:
        """The service takes a string, tables usually hold a number; a value out of bounds is refused."""
        rows = _jsonl(tmp_path, {"prompt": "a", "safety_tolerance": 5}, {"prompt": "a", "safety_tolerance": 9})
        assert rows[0].request == ImageRequest(prompt="a", safety_tolerance="5")
        assert rows[1].error is not None
        assert "safety_tolerance is '9'" in rows[1].error

    def test_nested_values_are_carried_unchanged(self, tmp_path: Path) -> None:
        """Other columns can hold any JSON value."""
        carried = {"tags": ["a", {"b": None}], "price": 1.5, "live": True, "note": ""}
        (row,) = _jsonl(tmp_path, {"prompt": "a", **carried})
        assert row.carried == carried

    def test_a_broken_line_is_an_invalid_row(self, tmp_path: Path) -> None:
        """Blank lines are skipped, and count for the line's number; other rows are read."""
        rows = _read(tmp_path, '\n{"prompt": "a"}\n  \r\n{"prompt": "b"\n{"prompt": "c"}', "table.ndjson")
        assert _prompts(rows) == ["a", None, "c"]
        assert rows[1].error is not None
        assert rows[1].error.startswith("row 2: line 4 is not JSON (")

    @pytest.mark.parametrize("line", ["[]", '"a lighthouse"', "42", "null", "true", '["prompt", "a"]'])
    def test_a_value_that_is_not_an_object_is_an_invalid_row(self, tmp_path: Path, line: str) -> None:
        """A string alone is not mistaken for an error message."""
        (row,) = _read(tmp_path, line, "table.jsonl")
        assert row.error == "row 1 is not an object with a prompt"

    @pytest.mark.parametrize(
        "value",
        [r'"\ud800"', r'{"deep": ["\udfff"]}', "NaN", "-Infinity", "1e999", "1" * 5000, "[" * 100_000],
        ids=lambda value: value[:12],
    )
    @pytest.mark.parametrize("name", ["id", "prompt", "note"])
    def test_a_value_that_no_record_can_hold_is_an_invalid_row(self, tmp_path: Path, name: str, value: str) -> None:
        """Half a character or a number that JSON can't write would break the report after everything was paid for."""
        rows = _read(tmp_path, f'{{"prompt": "a", "{name}": {value}}}\n{{"prompt": "b"}}\n', "table.jsonl")
        assert _prompts(rows) == [None, "b"]
        assert rows[0].error is not None
        assert rows[0].error.startswith("row 1: line 1 ")

    def test_each_row_has_columns_of_its_own(self, tmp_path: Path) -> None:
        """Their case does not count. Two columns for one field are an error of their row."""
        rows = _jsonl(tmp_path, {"Prompt": "a", "Seed": 1}, {"prompt": "a", "Id": "x"}, {"prompt": "a", "PROMPT": "b"})
        assert [(row.id, row.request) for row in rows[:2]] == [
            ("1", ImageRequest(prompt="a", seed=1)),
            ("x", ImageRequest(prompt="a")),
        ]
        assert rows[2].error == "row 3: the columns 'prompt' and 'PROMPT' are both the field 'prompt': rename one"

    def test_a_byte_order_mark_is_ignored(self, tmp_path: Path) -> None:
        """As written on Windows."""
        assert _prompts(_read(tmp_path, '\ufeff{"prompt": "a"}', "table.jsonl")) == ["a"]

    def test_other_encodings_are_refused(self, tmp_path: Path) -> None:
        """The error names the encoding to use."""
        with pytest.raises(TableError, match="save it as UTF-8"):
            _read(tmp_path, '{"prompt": "шар"}'.encode("koi8-r"), "table.jsonl")

    def test_an_empty_file_is_an_empty_table(self, tmp_path: Path) -> None:
        """JSON Lines have no header to miss."""
        assert _read(tmp_path, "", "table.jsonl") == []


class TestSources:
    """Files, lists and addresses."""

    @pytest.mark.parametrize("name", ["table.CSV", "table.csv"])
    def test_a_path_can_be_text_or_path(self, tmp_path: Path, name: str) -> None:
        """The suffix selects the format, in upper or lower case."""
        path = _csv(tmp_path, "prompt\na\n", name)
        assert list(read_table(path)) == list(read_table(str(path))) == [Row(1, "1", ImageRequest(prompt="a"))]

    @pytest.mark.parametrize("name", ["prompts.xlsx", "prompts", "prompts.csv.bz2", ".gz", ""])
    def test_another_suffix_is_refused_at_once(self, name: str) -> None:
        """Before anything is opened. The error names the suffixes that can be read."""
        with pytest.raises(TableError, match=r"neither \.csv nor \.jsonl nor \.parquet"):
            read_table(name)

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_a_missing_file_is_named(self, tmp_path: Path, suffix: str) -> None:
        """The error has the reason."""
        with pytest.raises(TableError, match=rf"nowhere\.{suffix}' can't be read: No such file"):
            list(read_table(tmp_path / f"nowhere.{suffix}"))

    def test_a_folder_without_tables_is_refused(self, tmp_path: Path) -> None:
        """Even with the suffix of a table."""
        (tmp_path / "table.csv").mkdir()
        with pytest.raises(TableError, match="has no tables: check the folder or pattern"):
            list(read_table(tmp_path / "table.csv"))

    def test_a_list_can_hold_requests_and_rows(self) -> None:
        """Rows are objects as in a JSON Lines file."""
        request = ImageRequest(prompt="a", seed=1)
        content: list[ImageRequest | dict[str, Any]] = [
            request,
            {"id": "x", "prompt": "b", "sku": 7},
            {"prompt": "c", "seed": 0},
            {"id": "x", "prompt": "d"},
        ]
        rows = list(read_table(content))
        assert rows[:2] == [Row(1, "1", request), Row(2, "x", ImageRequest(prompt="b"), {"sku": 7})]
        assert [row.error is None for row in rows] == [True, True, False, False]
        assert rows[3].error == "row 4: id 'x' is already the id of row 2: ids must differ"

    def test_a_long_table_is_read_row_by_row(self, tmp_path: Path) -> None:
        """The first row is returned before the last is read."""
        rows = read_table(_csv(tmp_path, "prompt\n" + "a\n" * 20_000 + '"broken\n'))
        assert next(rows) == Row(1, "1", ImageRequest(prompt="a"))
        with pytest.raises(TableError):
            list(rows)

    def test_a_listed_value_that_no_record_can_hold_is_an_invalid_row(self) -> None:
        """As in a file: nothing is paid for a row whose record could not be written."""
        rows = list(read_table([{"prompt": "a", "at": datetime(2026, 1, 1)}, {"prompt": "b", "x": "\ud800"}]))  # noqa: DTZ001
        assert [row.request for row in rows] == [None, None]
        assert all("holds a value that can't be stored" in str(row.error) for row in rows)

    def test_an_address_is_not_opened_as_a_file(self) -> None:
        """The error names the function that fetches it."""
        with pytest.raises(TableError, match="use open_table or open_source to fetch it"):
            read_table("s3://team/prompts.csv")

    @pytest.mark.parametrize("name", ["table.csv", "table.jsonl", "table.parquet"])
    async def test_a_table_can_be_read_again(self, tmp_path: Path, name: str) -> None:
        """Each reader gets the whole table, also while another reads; ids are checked for each reader alone."""
        if name == "table.parquet":
            path = _parquet(tmp_path, prompt=["a", "b"])
        else:
            path = _csv(tmp_path, "prompt\na\nb\n" if name == "table.csv" else '{"prompt":"a"}\n{"prompt":"b"}', name)
        async with open_table(path) as table:
            first, second = table.rows(), table.rows()
            assert next(first) == next(second) == Row(1, "1", ImageRequest(prompt="a"))
            assert list(first) == list(second) == [Row(2, "2", ImageRequest(prompt="b"))]

    async def test_a_list_can_be_opened_as_a_table(self) -> None:
        """So that a flow handles lists and addresses alike."""
        async with open_table([{"prompt": "a"}]) as table:
            assert list(table.rows()) == list(table.rows()) == [Row(1, "1", ImageRequest(prompt="a"))]


class TestParquet:
    """Tables in Parquet."""

    def test_a_row_is_a_request(self, tmp_path: Path) -> None:
        """NULL and NaN are the field's default; whole numbers may be stored as floats, and ids as numbers."""
        path = _parquet(
            tmp_path,
            id=[7, None],
            prompt=["a", "b"],
            seed=[3.0, float("nan")],
            guidance_scale=pyarrow.array([Decimal("2.5"), None]),
            safety_tolerance=pyarrow.array([5, None], pyarrow.int8()),
            output_format=pyarrow.array(["png", None]).dictionary_encode(),
        )
        request = ImageRequest(prompt="a", seed=3, guidance_scale=2.5, safety_tolerance="5", output_format="png")
        assert list(read_table(path)) == [Row(1, "7", request), Row(2, "2", ImageRequest(prompt="b"))]

    @pytest.mark.parametrize(
        ("value", "stored"),
        [
            (datetime(2026, 3, 1, 12, 30), "2026-03-01T12:30:00"),  # noqa: DTZ001 - tables can hold naive times
            (datetime(2026, 3, 1, 12, tzinfo=timezone.utc), "2026-03-01T12:00:00+00:00"),
            (pyarrow.scalar(1_700_000_000_123_456_789, pyarrow.timestamp("ns")), "2023-11-14T22:13:20.123456789"),
            (pyarrow.scalar(123_456_789, pyarrow.time64("ns")), "00:00:00.123456789"),
            (pyarrow.scalar(1_500_000_001, pyarrow.duration("ns")), 1.5),
            (date(2026, 3, 1), "2026-03-01"),
            (time(12, 30), "12:30:00"),
            (timedelta(minutes=2), 120.0),
            (Decimal("19.90"), "19.90"),
            (b"caf\xc3\xa9", "café"),
            (b"\xff\x00", "/wA="),
            (float("nan"), None),
            (True, True),
            (2**60, 2**60),
            ({"tags": ["a", None], "at": date(2026, 3, 1)}, {"tags": ["a", None], "at": "2026-03-01"}),
            (None, None),
        ],
    )
    def test_carried_values_become_plain(self, tmp_path: Path, value: Any, stored: Any) -> None:
        """Values that JSON can hold, none of Arrow's own types."""
        column = pyarrow.array([value])
        (row,) = read_table(_parquet(tmp_path, prompt=["a"], note=column))
        assert row.carried == {"note": stored}
        assert type(row.carried["note"]) is type(stored)

    def test_a_value_that_no_record_can_hold_is_an_invalid_row(self, tmp_path: Path) -> None:
        """As in JSON Lines; the rows around it are read."""
        rows = list(read_table(_parquet(tmp_path, prompt=["a", "b"], x=[float("inf"), 1.0])))
        assert _prompts(rows) == [None, "b"]
        assert str(rows[0].error).startswith("row 1: it holds a value that can't be stored")

    @pytest.mark.parametrize(
        ("columns", "complaint"),
        [
            ({"text": ["a"]}, "has no column 'prompt' among its columns text"),
            ({"prompt": ["a"], "Prompt": ["b"]}, "'prompt' and 'Prompt' are both the field 'prompt'"),
            ({}, "is empty"),
        ],
    )
    def test_the_columns_are_checked(self, tmp_path: Path, columns: dict[str, Any], complaint: str) -> None:
        """As in a CSV header."""
        with pytest.raises(TableError, match=complaint):
            list(read_table(_parquet(tmp_path, **columns)))

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"id,prompt\n1,a\n", b"PAR1" + b"\0" * 50 + b"PAR1"])
    def test_a_file_that_is_not_parquet_is_refused(self, tmp_path: Path, content: bytes) -> None:
        """The error has the file's name."""
        with pytest.raises(TableError, match=r"table\.parquet is not a Parquet file, or is broken"):
            _read(tmp_path, content, "table.parquet")

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        """Parquet's metadata is at the end of the file."""
        path = _parquet(tmp_path, prompt=["a"] * 100)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(TableError, match="broken"):
            list(read_table(path))

    def test_a_file_with_damaged_pages_is_refused(self, tmp_path: Path) -> None:
        """Also where its metadata is intact."""
        path = _parquet(tmp_path, prompt=[uuid.uuid4().hex for _ in range(700)])
        content = bytearray(path.read_bytes())
        content[4:2000] = b"\xff" * 1996
        path.write_bytes(content)
        with pytest.raises(TableError, match="broken"):
            list(read_table(path))

    def test_a_long_table_is_read_in_pieces(self, tmp_path: Path) -> None:
        """Row numbers run on over row groups and batches."""
        rows = list(read_table(_parquet(tmp_path, prompt=[f"p{n}" for n in range(1, 3001)])))
        assert [(row.number, row.id) for row in rows] == [(n, str(n)) for n in range(1, 3001)]
        assert _prompts(rows)[::1000] == ["p1", "p1001", "p2001"]

    def test_without_pyarrow_the_error_names_the_extra_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other formats do not need it."""
        path = _parquet(tmp_path, prompt=["a"])
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(TableError, match=r"pip install 'flux_prefect\[parquet\]'"):
            list(read_table(path))
        assert _prompts(_read(tmp_path, "prompt\na\n")) == ["a"]


class TestManifests:
    """Manifests of earlier runs as tables."""

    def test_the_rows_have_the_seeds_of_the_first_run(self, tmp_path: Path) -> None:
        """Number, id, request and carried columns are those of the first run, in the table's order."""
        rows = _jsonl(tmp_path, _record(3, "failed"), _record(1))
        assert rows == [
            Row(1, "id-1", ImageRequest(prompt="a boat 1", seed=1), {"sku": "001"}),
            Row(3, "id-3", ImageRequest(prompt="a boat 3", seed=3), {"sku": "003"}),
        ]

    def test_an_invalid_row_stays_invalid(self, tmp_path: Path) -> None:
        """With its reason. A request that another version wrote, and that this one rejects, is invalid as well."""
        rows = _jsonl(
            tmp_path,
            _record(1, "invalid", request=None, message="row 1: seed is '0'"),
            _record(2, request={"prompt": "a", "colour": "red"}),
        )
        assert [row.request for row in rows] == [None, None]
        assert rows[0].error == "row 1: seed is '0'"
        assert str(rows[1].error).startswith("row 2: colour is 'red'")

    @pytest.mark.parametrize(
        ("only", "taken"),
        [
            (None, [1, 2, 3, 4, 5, 6]),
            ("failed", [3]),
            ("flagged", [4]),
            ("skipped_budget", [5]),
            ("unpublished", [3, 5]),
        ],
    )
    def test_rows_can_be_selected_by_status(self, tmp_path: Path, only: Any, taken: list[int]) -> None:
        """`unpublished` selects rows worth another try: invalid and flagged rows would end the same way."""
        statuses = ["published", "unchanged", "failed", "flagged", "skipped_budget", "invalid"]
        records = [_record(row, status) for row, status in enumerate(statuses, start=1)]
        path = _csv(tmp_path, "\n".join(map(json.dumps, records)), "manifest.jsonl")
        for source in (path, records):
            assert [row.number for row in read_table(source, only=only)] == taken

    @pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
    def test_only_needs_a_manifest(self, tmp_path: Path, name: str) -> None:
        """Other tables have no statuses, and publishing all their rows would cost more than was asked for."""
        path = _csv(tmp_path, "prompt\na\n" if name == "table.csv" else '{"prompt": "a"}', name)
        with pytest.raises(TableError, match="only='failed' needs the manifest of an earlier run"):
            list(read_table(path, only="failed"))

    def test_a_table_can_have_a_column_named_manifest(self, tmp_path: Path) -> None:
        """It is carried like any other column."""
        (row,) = _jsonl(tmp_path, {"prompt": "a", "manifest": 1})
        assert row.carried == {"manifest": 1}

    def test_an_incomplete_last_line_is_skipped(self, tmp_path: Path) -> None:
        """A killed run may leave one. Of two records of a row the last counts."""
        lines = [_record(2, "failed"), _record(1, "failed"), _record(2), _record(3)]
        content = "\n".join(map(json.dumps, lines))[:-20]
        path = _csv(tmp_path, content, "manifest.jsonl")
        assert [row.number for row in Table(local_source(path)).rows()] == [1, 2]
        assert [row.number for row in Table(local_source(path), only="failed").rows()] == [1]

    @pytest.mark.parametrize(
        ("second", "complaint"),
        [
            ('{"manifest": 1, "ro', "line 2 is broken"),
            ('{"prompt": "b"}', "line 2 is not a manifest record"),
            (json.dumps(_record(7, run="run-2")), "line 2: the manifest of another run begins"),
        ],
    )
    def test_a_broken_manifest_is_refused(self, tmp_path: Path, second: str, complaint: str) -> None:
        """Publishing a part of it silently would be worse."""
        content = f"{json.dumps(_record(1))}\n{second}\n{json.dumps(_record(2))}\n"
        with pytest.raises(TableError, match=complaint):
            _read(tmp_path, content, "manifest.jsonl")
