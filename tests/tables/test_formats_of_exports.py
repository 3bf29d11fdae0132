"""Encodings, formats, folders and columns as spreadsheets and exports write them."""

from __future__ import annotations

import gzip
import json
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from flux_prefect.api.models import ImageRequest, ImageSettings
from flux_prefect.batch.planning import seeded_rows
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import TableError
from flux_prefect.manifest.joining import join_images, read_parquet_table
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.seeds import draw_day_seed, draw_seed
from flux_prefect.tables.prompts import render_prompts
from flux_prefect.tables.reading import Reading
from flux_prefect.tables.sources import local_source, open_source
from flux_prefect.tables.table import Row, Table, open_table, read_table
from flux_prefect.tables.templates import RowRenderer

WORDS = "ein Schiff für Größe – “Café” 5 €"
ROWS = [{"id": "a", "prompt": "a cat"}, {"id": "b", "prompt": "a dog"}]
READ = [Row(1, "a", ImageRequest(prompt="a cat")), Row(2, "b", ImageRequest(prompt="a dog"))]
CSV = b"id,prompt\na,a cat\nb,a dog\n"


def read(path: str | Path) -> tuple[list[Row], Reading]:
    """The rows of a source, and how it was read."""
    table = Table(local_source(path))
    reading = table.new_reading()
    return list(table.rows(reading)), reading


def write(path: Path, content: bytes) -> Path:
    """A file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def compress_zstd(content: bytes) -> bytes:
    """As `zstd` does."""
    pyarrow = pytest.importorskip("pyarrow")
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    packed: bytes = target.getvalue().to_pybytes()
    return packed


def write_parquet(path: Path, columns: Any) -> Path:
    """A Parquet file with its folders."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


class TestEncodings:
    """The plan says which encoding was found, unless it is UTF-8."""

    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
    @pytest.mark.parametrize(
        ("encoding", "start", "shown"),
        [
            ("utf-8", b"", None),
            ("utf-8-sig", b"", None),
            ("utf-16", b"", "UTF-16"),
            ("utf-16-be", b"\xfe\xff", "UTF-16"),
            ("utf-16-le", b"", "UTF-16"),
            ("utf-16-be", b"", "UTF-16"),
            ("cp1252", b"", "Windows-1252"),
        ],
    )
    def test_it_is_found(self, tmp_path: Path, suffix: str, encoding: str, start: bytes, shown: str | None) -> None:
        """By its byte order mark, the NUL bytes of UTF-16, or the letters of Windows-1252."""
        line = json.dumps({"prompt": WORDS, "seed": 7}, ensure_ascii=False)
        text = {
            ".csv": f"prompt,seed\r\n{WORDS},7\r\n",
            ".tsv": f"prompt\tseed\n{WORDS}\t7\n",
            ".jsonl": line + "\n",
            ".json": f"[{line}]",
        }
        rows, reading = read(write(tmp_path / f"table{suffix}", start + text[suffix].encode(encoding)))
        assert rows == [Row(1, "1", ImageRequest(prompt=WORDS, seed=7))]
        assert reading.describe().get("encoding") == shown

    @pytest.mark.parametrize("undefined", [0x81, 0x8D, 0x8F, 0x90, 0x9D])
    def test_a_byte_that_windows_1252_does_not_define_is_refused(self, tmp_path: Path, undefined: int) -> None:
        """The message has the line and the remedy."""
        path = write(tmp_path / "table.csv", b"prompt\na caf\xe9\nb " + bytes([undefined]) + b"\n")
        with pytest.raises(TableError, match=r"table\.csv, line 2: it is not UTF-8 text.*save it as UTF-8"):
            read(path)

    def test_a_letter_that_a_piece_of_the_file_ends_in_is_read(self, tmp_path: Path) -> None:
        """Files are checked in pieces of 1 MiB."""
        filler = "x" * (1024 * 1024 - len("note,prompt\n") - 1)
        rows, reading = read(write(tmp_path / "table.csv", f"note,prompt\n{filler}é,a\n".encode()))
        assert (rows[0].carried, reading.encoding) == ({"note": f"{filler}é"}, "utf-8")


class TestFormats:
    """One table in every format."""

    @pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
    @pytest.mark.parametrize(
        ("suffix", "content"),
        [
            (".csv", CSV),
            (".tsv", CSV.replace(b",", b"\t")),
            (".tab", CSV.replace(b",", b"\t")),
            (".jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)),
            (".json", json.dumps(ROWS, indent=1).encode()),
        ],
    )
    async def test_it_is_read_compressed_or_not(self, tmp_path: Path, suffix: str, packed: str, content: bytes) -> None:
        """From a path, any number of times."""
        if packed:
            content = gzip.compress(content) if packed == ".gz" else compress_zstd(content)
        path = write(tmp_path / f"table{suffix}{packed}", content)
        assert list(read_table(path)) == READ
        async with open_table(path) as table:
            assert list(table.rows()) == list(table.rows()) == READ

    @pytest.mark.parametrize("packed", [".gz", ".zst"])
    @pytest.mark.parametrize("content", [b"id,prompt\n", gzip.compress(CSV)[:-9], b""])
    def test_a_broken_archive_is_refused(self, tmp_path: Path, packed: str, content: bytes) -> None:
        """With its name. No row of it is read."""
        pytest.importorskip("pyarrow")
        with pytest.raises(TableError, match=r"table\.csv\.(gz|zst)'? (can't be decompressed as|is empty)"):
            read(write(tmp_path / f"table.csv{packed}", content))

    @pytest.mark.parametrize("kind", ["file", "stream"])
    @pytest.mark.parametrize("suffix", [".arrow", ".feather"])
    def test_arrow_is_read(self, tmp_path: Path, kind: str, suffix: str) -> None:
        """Files and streams, over several batches."""
        pyarrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
        table = pyarrow.table({"id": ["a", "b"], "prompt": ["a cat", "a dog"]})
        path = tmp_path / f"table{suffix}"
        with (ipc.new_file if kind == "file" else ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        assert read(path)[0] == READ

    @pytest.mark.parametrize("content", [b"", b"ARROW1", b"ARROW1\0\0rest", b"no arrow at all"])
    def test_a_broken_arrow_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        """With its name."""
        pytest.importorskip("pyarrow")
        with pytest.raises(TableError, match=r"table\.arrow is not an Arrow file, or is broken"):
            read(write(tmp_path / "table.arrow", content))

    def test_a_large_array_is_read_in_pieces(self, tmp_path: Path) -> None:
        """Values and numbers that a piece of 64 KiB cuts are whole; each error has its line."""
        rows: list[Any] = [{"prompt": f"cat {n}", "note": "é" * (n % 90), "n": n} for n in range(3000)]
        rows[2000] = {"prompt": "x" * 200_000}
        rows[2500] = 12345
        text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
        read_rows, _ = read(write(tmp_path / "table.json", text.encode()))
        assert len(read_rows) == 3000
        for row, given in zip(read_rows, rows, strict=True):
            if row.number in {2001, 2501}:
                assert row.error is not None
            else:
                assert row.request == ImageRequest(prompt=given["prompt"])
                assert row.carried == {"note": given["note"], "n": given["n"]}

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ('[{"prompt": "a"}\n{"prompt": "b"}]', r"table\.json, line 2: .*a comma or \] is missing"),
            ('[{"prompt": "a"},\n{"prompt": ', r"table\.json, line 2: the JSON array is broken"),
            ('[{"prompt": "a"}] more', "something follows the array"),
            ("[" * 100_000, "broken"),
        ],
    )
    def test_a_broken_array_is_refused(self, tmp_path: Path, text: str, complaint: str) -> None:
        """With the line, and JSON Lines as a remedy."""
        with pytest.raises(TableError, match=complaint):
            read(write(tmp_path / "table.json", text.encode()))

    def test_json_lines_in_a_json_file_are_read(self, tmp_path: Path) -> None:
        """As many exports name it."""
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        assert read(write(tmp_path / "table.json", lines.encode()))[0] == READ
        assert read(write(tmp_path / "none.json", b" [ ] "))[0] == []

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
    def test_line_ends_may_be_mixed(self, tmp_path: Path, end: bytes) -> None:
        """Carriage returns alone too."""
        assert read(write(tmp_path / "table.csv", b"id,prompt" + end + b"a,a cat\r\nb,a dog" + end))[0] == READ

    def test_quotes_within_a_cell_are_kept(self, tmp_path: Path) -> None:
        """Where the cell does not begin with one."""
        (row,), _ = read(write(tmp_path / "table.csv", b'prompt\na 5" nail, no\n'.replace(b",", b"")))
        assert row.request == ImageRequest(prompt='a 5" nail no')

    @pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolon"), ("\t", "tab"), ("|", "pipe")])
    def test_the_delimiter_is_said(self, tmp_path: Path, delimiter: str, name: str) -> None:
        """In the plan."""
        rows, reading = read(write(tmp_path / "table.csv", CSV.replace(b",", delimiter.encode())))
        assert (rows, reading.describe()["delimiter"]) == (READ, name)

    def test_a_header_that_is_too_long_is_refused(self, tmp_path: Path) -> None:
        """As broken CSV."""
        with pytest.raises(TableError, match="broken CSV"):
            read(write(tmp_path / "table.csv", b"x" * (16 * 1024 * 1024 + 1) + b"\n"))


class TestColumns:
    """Types of Arrow, and columns that are chosen."""

    def test_every_type_is_carried_through(self, tmp_path: Path) -> None:
        """As JSON holds it."""
        pyarrow = pytest.importorskip("pyarrow")
        moment = datetime(2026, 11, 26, 16, 30, tzinfo=timezone.utc)
        columns = {
            "prompt": pyarrow.array(["a cat", "a dog"]).dictionary_encode(),
            "kind": pyarrow.array(["x", None]).dictionary_encode(),
            "price": pyarrow.array([Decimal("9.90"), None]),
            "length": pyarrow.array([timedelta(seconds=90), None], pyarrow.duration("ns")),
            "at": pyarrow.array([moment, None], pyarrow.timestamp("us", "UTC")),
            "on": pyarrow.array([date(2026, 11, 26), None]),
            "tags": pyarrow.array([["a", None], None]),
            "size": pyarrow.array([{"w": 1, "h": None}, None]),
            "words": pyarrow.array([[("de", 1), ("fr", 2)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "log": pyarrow.array([[("t", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.timestamp("ns"))),
        }
        rows, _ = read(write_parquet(tmp_path / "table.parquet", columns))
        assert [row.request for row in rows] == [ImageRequest(prompt="a cat"), ImageRequest(prompt="a dog")]
        assert rows[0].carried == {
            "kind": "x",
            "price": "9.90",
            "length": 90.0,
            "at": "2026-11-26T16:30:00+00:00",
            "on": "2026-11-26",
            "tags": ["a", None],
            "size": {"w": 1, "h": None},
            "words": [["de", 1], ["fr", 2]],
            "log": [["t", "1970-01-01T00:00:00.000000001"]],
        }
        assert rows[1].carried == dict.fromkeys(rows[0].carried)
        json.dumps(rows[0].carried)

    async def test_columns_are_chosen(self, tmp_path: Path) -> None:
        """By their own names. A column with the field's name is then carried through under another."""
        path = write(tmp_path / "table.csv", b"SKU,Beschreibung,prompt,input_prompt\n7,a fox,x,y\n")
        chosen = {"prompt": "beschreibung", "id": "SKU"}
        row = Row(1, "7", ImageRequest(prompt="a fox"), {"input_prompt": "y", "input_input_prompt": "x"})
        assert list(read_table(path, columns=chosen)) == [row]
        async with open_table(path, columns=chosen) as table:
            assert list(table.rows()) == [row]

    @pytest.mark.parametrize(
        ("columns", "complaint"),
        [
            ({"colour": "x"}, "'colour', which is not a field"),
            ({"prompt": "x", "id": " x"}, "'x' for several fields"),
            ({"prompt": ""}, "'' for several fields|needs a column"),
            ({"prompt": "text"}, "'text' for prompt, and the columns are 'id', 'prompt'"),
        ],
    )
    def test_a_wrong_choice_is_refused(self, tmp_path: Path, columns: dict[str, str], complaint: str) -> None:
        """Before any row is read."""
        with pytest.raises(TableError, match=complaint):
            list(read_table(write(tmp_path / "table.csv", CSV), columns=columns))


class TestFolders:
    """Folders and patterns, here and in a bucket."""

    FILES: ClassVar = {
        "2.jsonl": b'{"id": "b", "prompt": "a dog"}\n',
        "1.csv": b"id,prompt\na,a cat\n",
        ".hidden.csv": b"id,prompt\nx,hidden\n",
        "_SUCCESS": b"",
        "_temporary/3.csv": b"id,prompt\nx,unfinished\n",
        "notes.txt": b"not a table",
    }

    @pytest.mark.parametrize("pattern", ["", "/", "/[12].*", "/**/[12].*"])
    async def test_files_are_read_in_the_order_of_their_names(self, tmp_path: Path, pattern: str) -> None:
        """Each in its own format; hidden and other files are left out."""
        for name, content in self.FILES.items():
            write(tmp_path / "prompts" / name, content)
        source = f"{tmp_path}/prompts{pattern}"
        assert read(source)[0] == READ
        async with open_table(source) as table:
            assert list(table.rows()) == list(table.rows()) == READ

    @pytest.mark.parametrize("pattern", ["", "/", "/*.*l", "/*"])
    async def test_a_folder_of_a_bucket_is_read(self, bucket: ImageBucket, pattern: str) -> None:
        """Each file is fetched once."""
        for name, content in self.FILES.items():
            await bucket.write_path(f"prompts/{name}", content)
        async with open_table(f"{bucket.uri}/prompts{pattern}", bucket=bucket) as table:
            rows = list(table.rows())
            assert rows == list(table.rows())
        if pattern == "/*.*l":
            assert [row.id for row in rows] == ["b"]
        elif pattern == "/*":
            assert {row.id for row in rows} >= {"a", "b"}
        else:
            assert rows == READ

    async def test_compressed_and_partitioned_objects_are_read(self, bucket: ImageBucket) -> None:
        """With the partition as a column."""
        await bucket.write_path("prompts/country=de/a.csv.gz", gzip.compress(b"id,prompt\na,a cat\n"))
        await bucket.write_path("prompts/country=fr/a.csv", b"id,prompt\nb,a dog\n")
        async with open_table(f"{bucket.uri}/prompts/**/*", bucket=bucket) as table:
            assert [(row.id, row.carried) for row in table.rows()] == [
                ("a", {"country": "de"}),
                ("b", {"country": "fr"}),
            ]

    async def test_partitions_are_columns(self, tmp_path: Path) -> None:
        """Also those that are fields; an unnamed partition is an empty cell. Numbers go on over the files."""
        write_parquet(tmp_path / "t/aspect_ratio=1%3A1/country=de/a.parquet", {"id": ["a"], "prompt": ["a cat"]})
        write_parquet(
            tmp_path / "t/aspect_ratio=16%3A9/country=__HIVE_DEFAULT_PARTITION__/b.parquet",
            {"id": ["b"], "prompt": ["a dog"]},
        )
        rows, _ = read(tmp_path / "t")
        assert rows == [
            Row(1, "a", ImageRequest(prompt="a cat", aspect_ratio="1:1"), {"country": "de"}),
            Row(2, "b", ImageRequest(prompt="a dog", aspect_ratio="16:9"), {"country": ""}),
        ]

    @pytest.mark.parametrize("pattern", ["", "/", "/*.csv", "/**/*.csv", "/./[a]*.csv"])
    def test_folders_above_the_source_are_no_columns(self, tmp_path: Path, pattern: str) -> None:
        """Such as those of the run that wrote the table."""
        write(tmp_path / "run=7/prompts/a.csv", CSV)
        assert read(f"{tmp_path}/run=7/prompts{pattern}")[0] == read(tmp_path / "run=7/prompts/a.csv")[0]

    async def test_folders_above_the_source_in_a_bucket_are_no_columns(self, bucket: ImageBucket) -> None:
        """Neither for a folder nor for a pattern."""
        await bucket.write_path("run=7/prompts/country=de/a.csv", b"id,prompt\na,a cat\n")
        for source in ("run=7/prompts/", "run=7/prompts/**/*.csv", "run=7/prompts/country=*/a.csv"):
            async with open_table(f"{bucket.uri}/{source}", bucket=bucket) as table:
                assert [row.carried for row in table.rows()] == [{"country": "de"}]

    def test_a_partition_that_a_row_contradicts_is_refused(self, tmp_path: Path) -> None:
        """With the file and the row."""
        write(tmp_path / "t/country=de/a.csv", b"prompt,country\na,de\nb,fr\n")
        with pytest.raises(TableError, match=r"a\.csv, row 2: country is 'fr', and the folder's name says 'de'"):
            read(tmp_path / "t")

    def test_an_unreadable_row_has_the_name_of_its_file(self, tmp_path: Path) -> None:
        """Its number is that of the whole, and that in its file."""
        write(tmp_path / "t/1.csv", b"prompt\na\nb\n")
        write(tmp_path / "t/2.jsonl", b"{\n")
        error = read(tmp_path / "t")[0][2].error
        assert error is not None
        assert error.startswith("row 3: line 1 is not JSON")
        assert error.endswith("2.jsonl)")

    async def test_a_folder_without_tables_is_refused(self, tmp_path: Path, bucket: ImageBucket) -> None:
        """Here and in a bucket."""
        (tmp_path / "t").mkdir()
        for source in (str(tmp_path / "t"), f"{tmp_path}/*.csv", f"{bucket.uri}/nothing/"):
            with pytest.raises(TableError, match="has no tables: check the folder or pattern"):
                async with open_source(source, bucket=bucket):
                    pass

    async def test_what_needs_one_file_refuses_several(self, tmp_path: Path, bucket: ImageBucket) -> None:
        """It never reads the first alone."""
        write_parquet(tmp_path / "a.parquet", {"id": ["a"]})
        with pytest.raises(TableError, match="is several files: name one of them"):
            await read_parquet_table(f"{tmp_path}/*.parquet", bucket)

    def test_a_manifest_is_read_alone(self, tmp_path: Path) -> None:
        """Not as one of several tables."""
        record = {"manifest": 1, "row": 1, "id": "a", "status": "failed", "carried": {}, "request": None}
        write(tmp_path / "t/1.csv", CSV)
        write(tmp_path / "t/2.jsonl", json.dumps(record).encode() + b"\n")
        with pytest.raises(TableError, match=r"2\.jsonl is a manifest: read it alone"):
            read(tmp_path / "t")


class TestContentTypes:
    """Addresses without a suffix, such as those of a spreadsheet's export."""

    @pytest.mark.parametrize(
        ("headers", "content"),
        [
            ({"Content-Type": "text/csv"}, CSV),
            ({"Content-Type": "text/csv; charset=utf-8"}, CSV),
            ({"Content-Type": "text/tab-separated-values"}, CSV.replace(b",", b"\t")),
            ({"Content-Type": "application/json"}, json.dumps(ROWS).encode()),
            ({"Content-Type": "application/x-ndjson"}, b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)),
            (
                {"Content-Type": "application/octet-stream", "Content-Disposition": 'attachment; filename="a.csv.gz"'},
                gzip.compress(CSV),
            ),
        ],
    )
    @pytest.mark.parametrize("path", ["export?format=csv", "pub?output=csv&gid=1.5"])
    async def test_the_content_type_is_the_format(self, headers: dict[str, str], content: bytes, path: str) -> None:
        """Or the name in its Content-Disposition."""
        transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=content))
        async with open_source(f"https://files.example/d/1/{path}", transport=transport) as source:
            assert list(Table(source).rows()) == READ

    @pytest.mark.parametrize("content_type", ["application/pdf", ""])
    async def test_another_content_type_is_refused(self, content_type: str) -> None:
        """With an address that would do; without the query."""
        headers = {"Content-Type": content_type} if content_type else {}
        transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=b"x"))
        with pytest.raises(TableError, match=r"'https://files\.example/d' has the content type (application/pdf|none)"):
            async with open_source("https://files.example/d?key=5ecret", transport=transport):
                pass


class TestSeedsOfIds:
    """What was published before is found: a seed is drawn from an id as it is written."""

    @pytest.mark.parametrize(
        ("written", "shown", "seed_id"), [("1.0", "1", "1.0"), (1.0, "1", "1.0"), (" x ", "x", "x"), (7, "7", "7")]
    )
    def test_a_batch(self, written: Any, shown: str, seed_id: str) -> None:
        """A whole number loses its .0 only where it is shown."""
        (row,) = seeded_rows(Table([{"id": written, "prompt": "a"}]), "run")
        assert (row.id, row.request) == (shown, ImageRequest(prompt="a", seed=draw_seed("run", seed_id)))

    def test_a_row_without_id(self) -> None:
        """Its number counts."""
        (row,) = seeded_rows(Table([{"prompt": "a"}]), "run")
        assert row.request == ImageRequest(prompt="a", seed=draw_seed("run", "1"))

    @pytest.mark.parametrize("written", ["1.0", 1.0])
    def test_a_day_and_a_catalogue(self, written: Any) -> None:
        """As in a batch."""
        day = date(2026, 11, 26)
        daily = RowRenderer(day, "a", ImageSettings()).render(1, {"id": written})
        assert (daily["id"], daily["seed"]) == ("1", draw_day_seed(day, "1.0"))
        (product,) = render_prompts([{"id": written}], "a")
        assert (product["id"], product["seed"]) == ("1", draw_seed("products", "1.0"))

    def test_images_are_joined_by_either_spelling(self) -> None:
        """Manifests of the last release have the ids as they were written."""
        pyarrow = pytest.importorskip("pyarrow")
        records = [
            ItemRecord(row=number, id=row_id, status="failed", message=row_id, request=None)
            for number, row_id in ((1, "1.0"), (2, "2"))
        ]
        joined = join_images(pyarrow.table({"id": [1.0, 2.0, 3.0]}), records)
        assert joined.column("image_status").to_pylist() == ["failed", "failed", None]

    def test_a_catalogue_prints_what_it_printed(self) -> None:
        """Decimals and lists too; a null within a list is an error."""
        row = {"id": 1, "price": Decimal("9.90"), "tags": ["a", "b"], "gaps": ["a", None]}
        (rendered,) = render_prompts([row], "{{ price }} {{ tags }}")
        assert rendered["prompt"] == "9.90 ['a', 'b']"
        with pytest.raises(TableError, match="the column 'gaps' is empty in this row"):
            list(render_prompts([row], "{{ gaps }}"))
