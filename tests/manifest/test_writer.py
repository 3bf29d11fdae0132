"""The manifest of a run, against a real S3 server."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import PrivateAttr
from support.s3_proxy import Answer, Passing, open_proxy

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishedImage
from flux_prefect.errors import BucketMissing, BucketUnavailable, ManifestUnwritable, TableError
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.writer import ManifestWriter
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tables.manifest_lines import read_manifest, repair_last_line
from flux_prefect.tables.table import Row, open_table, read_table

pyarrow = importlib.import_module("pyarrow")
parquet = importlib.import_module("pyarrow.parquet")

RUN = "0b9f5c8e-run"


def _image(row: int) -> PublishedImage:
    return PublishedImage(
        bucket="images",
        key=f"team/{row}.jpg",
        uri=f"s3://images/team/{row}.jpg",
        url=f"https://cdn.example/team/{row}.jpg",
        etag="e",
        sha256=f"{row:064x}",
        size=1000,
        content_type="image/jpeg",
        width=96,
        height=64,
        fingerprint=f"{row:032x}",
        index=0,
        seed=row,
        sidecar_key=f"team/{row}.jpg.{row:016x}.json",
        published_at=datetime(2026, 3, 1, 12, tzinfo=timezone.utc),
        created=True,
    )


def _record(row: int, status: Any = "published", **changes: Any) -> ItemRecord:
    return ItemRecord(
        **{
            "row": row,
            "id": f"id-{row}",
            "status": status,
            "request": None if status == "invalid" else ImageRequest(prompt=f"a boat {row} für dich", seed=row),
            "images": (_image(row),) if status in {"published", "unchanged"} else (),
            "message": None if status == "published" else "what happened",
            "credits_used": 168_000.0,
            "carried": {"sku": f"{row:03}"},
            **changes,
        }
    )


def _head(bucket: ImageBucket, path: str) -> Any:
    return bucket.get_client().head_object(Bucket=bucket.bucket_name, Key=f"{bucket.prefix}/{path}")


async def _lines(bucket: ImageBucket, path: str = f"manifests/{RUN}/manifest.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (await bucket.read_path(path)).splitlines()]


async def _columns(bucket: ImageBucket, path: str = f"manifests/{RUN}/manifest.parquet") -> Any:
    return parquet.read_table(io.BytesIO(await bucket.read_path(path)))


def _line(row: int) -> bytes:
    record = {"manifest": 1, **_record(row).model_dump(mode="json"), "run": RUN}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


async def _write(bucket: ImageBucket, folder: Path, *records: ItemRecord) -> ManifestWriter:
    async with ManifestWriter(bucket, RUN, folder) as manifest:
        for record in records:
            manifest.append(record)
    return manifest


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(60):
        while not await condition():  # noqa: ASYNC110 - a server and another process signal no changes
            await anyio.sleep(0.02)


class TestAtTheEnd:
    """The manifest in the bucket when the run has ended."""

    async def test_each_row_has_a_record_in_the_tables_order(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """In whatever order rows ended; the fields of the first image are also fields of the record."""
        manifest = await _write(bucket, tmp_path, _record(3), _record(1, "failed"), _record(2))
        lines = await _lines(bucket)
        assert [line["row"] for line in lines] == [1, 2, 3]
        expected = _record(3).model_dump(mode="json")
        image = expected["images"][0]
        flat = {name: image[name] for name in ("sha256", "width", "height", "key", "uri", "url")}
        assert lines[2] == {"manifest": 1, **expected, "run": RUN, "seed": 3, **flat}
        assert (lines[0]["status"], lines[0]["sha256"], lines[0]["seed"]) == ("failed", None, 1)
        assert list(read_manifest(manifest.path)) == lines
        assert manifest.uri == f"{bucket.uri}/manifests/{RUN}/manifest.jsonl"

    async def test_the_latest_run_has_copies_under_stable_keys(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """In both formats, never served from a cache; the next run replaces only these copies."""
        await _write(bucket, tmp_path, _record(1))
        assert await bucket.read_path("manifests/latest.jsonl") == await bucket.read_path(
            f"manifests/{RUN}/manifest.jsonl"
        )
        assert (await _columns(bucket, "manifests/latest.parquet")).equals(await _columns(bucket))
        async with ManifestWriter(bucket, "run-2", tmp_path) as manifest:
            manifest.append(_record(7))
        assert [line["row"] for line in await _lines(bucket, "manifests/latest.jsonl")] == [7]
        assert [line["row"] for line in await _lines(bucket)] == [1]
        for name, kind in (("jsonl", "application/x-ndjson"), ("parquet", "application/vnd.apache.parquet")):
            head = _head(bucket, f"manifests/latest.{name}")
            assert (head["CacheControl"], head["ContentType"]) == ("no-cache", kind)

    async def test_a_row_recorded_again_has_one_record(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """A retried run appends to its file, and the last record of a row counts."""
        await _write(bucket, tmp_path, _record(1, "failed"), _record(2))
        await _write(bucket, tmp_path, _record(1), _record(3))
        assert [(line["row"], line["status"]) for line in await _lines(bucket)] == [
            (1, "published"),
            (2, "published"),
            (3, "published"),
        ]

    async def test_only_the_manifest_is_left_in_the_folder(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """No temporary file of an upload remains."""
        manifest = await _write(bucket, tmp_path / "new" / "folder", _record(1))
        assert list(manifest.path.parent.iterdir()) == [manifest.path]
        assert manifest.path == tmp_path / "new" / "folder" / f"{RUN}.jsonl"

    async def test_an_empty_run_has_a_manifest(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """Without rows, but with the columns."""
        await _write(bucket, tmp_path)
        assert await _lines(bucket) == []
        columns = await _columns(bucket)
        assert columns.num_rows == 0
        assert {"id", "status", "prompt", "sha256"} <= set(columns.column_names)

    @pytest.mark.parametrize("missing", ["pyarrow", "pyarrow.parquet"])
    async def test_without_pyarrow_only_json_lines_are_written(
        self, bucket: ImageBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        """Also where pyarrow is installed and broken: the run does not fail."""
        monkeypatch.setitem(sys.modules, missing, None)
        await _write(bucket, tmp_path, _record(1))
        assert len(await _lines(bucket, "manifests/latest.jsonl")) == 1
        with pytest.raises(ValueError, match="There is no object"):
            await bucket.read_path(f"manifests/{RUN}/manifest.parquet")

    @pytest.mark.parametrize("run", ["", "../up", "a/b", ".hidden", "a\nb", "x" * 200])
    def test_an_unsafe_run_id_is_refused(self, tmp_path: Path, run: str) -> None:
        """It is part of a key and of a file name."""
        with pytest.raises(ValueError, match="can't be part of a key"):
            ManifestWriter(ImageBucket(bucket_name="images"), run, tmp_path)

    async def test_a_lone_surrogate_is_replaced(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """A message of the service can contain half a character; the record is written with a question mark."""
        await _write(bucket, tmp_path, _record(1, "failed", message="half \ud83d of it"))
        assert (await _lines(bucket))[0]["message"] == "half ? of it"
        assert (await _columns(bucket))["message"].to_pylist() == ["half ? of it"]


class TestColumns:
    """The manifest in Parquet."""

    async def test_each_field_has_a_column(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """The fields of record, request and first image, each with its type, and the table's other columns."""
        await _write(bucket, tmp_path, _record(1, possibly_billed=("fp-1", "fp-2")), _record(2, "invalid"))
        table = await _columns(bucket)
        types = {field.name: str(field.type) for field in table.schema}
        wanted = {
            "row": "int64",
            "id": "string",
            "status": "string",
            "credits_used": "double",
            "regenerated": "bool",
            "possibly_billed": "list<element: string>",
            "prompt": "string",
            "seed": "int64",
            "guidance_scale": "double",
            "images": "string",
            "sha256": "string",
            "width": "int64",
            "url": "string",
            "run": "string",
            "sku": "string",
        }
        assert {name: types.get(name) for name in wanted} == wanted
        first, second = table.to_pylist()
        assert (first["prompt"], first["seed"], first["width"], first["sku"]) == ("a boat 1 für dich", 1, 96, "001")
        assert (first["run"], first["possibly_billed"], first["key"]) == (RUN, ["fp-1", "fp-2"], "team/1.jpg")
        assert json.loads(first["images"])[0]["uri"] == "s3://images/team/1.jpg"
        assert (second["status"], second["prompt"], second["seed"], second["sku"]) == ("invalid", None, None, "002")

    async def test_every_runs_columns_have_the_same_types(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """Even where a column is empty in one run, so that manifests can be read together."""
        await _write(bucket, tmp_path, _record(1))
        first = (await _columns(bucket)).schema.remove_metadata()
        await _write(bucket, tmp_path / "2", _record(1, "failed", error="AnswerLost", request=None))
        assert (await _columns(bucket)).schema.remove_metadata() == first

    async def test_carried_columns_join_with_the_table(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """Under their own names, in order, NULL where a row has none."""
        await _write(
            bucket,
            tmp_path,
            _record(1, carried={"sku": "007", "price": 1.5, "tags": ["a"], "mixed": 1}),
            _record(2, carried={"price": 2, "live": True, "mixed": "x", "count": 2**60, "huge": 2**70}),
            _record(3, "invalid", carried={"sku": None, "count": 1, "void": None}),
        )
        table = await _columns(bucket)
        names = ["sku", "price", "tags", "mixed", "live", "count", "huge", "void"]
        assert table.column_names[-8:] == names
        assert [table[name].to_pylist() for name in names] == [
            ["007", None, None],
            [1.5, 2.0, None],
            ['["a"]', None, None],
            ["1", "x", None],
            [None, True, None],
            [None, 2**60, 1],
            [None, str(2**70), None],
            [None, None, None],
        ]

    async def test_a_taken_name_gets_a_prefix(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """Names are compared case-insensitively, and no other column of the table is overwritten."""
        carried = {"status": "s", "input_status": "i", "Key": "k", "note": "n", "NOTE": "N", "": "e"}
        await _write(bucket, tmp_path, _record(1, carried=carried))
        (row,) = (await _columns(bucket)).to_pylist()
        assert row["status"] == "published"
        assert {name: row[name] for name in list(row)[-6:]} == {
            "input_input_status": "s",
            "input_status": "i",
            "input_Key": "k",
            "note": "n",
            "input_NOTE": "N",
            "input_": "e",
        }

    async def test_a_parquet_manifest_is_refused_as_a_table(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """The error names the format to use; its columns are not mistaken for carried ones."""
        await _write(bucket, tmp_path, _record(1))
        async with open_table(f"{bucket.uri}/manifests/latest.parquet", bucket=bucket) as table:
            with pytest.raises(TableError, match=r"is a manifest in Parquet.* use the \.jsonl"):
                list(table.rows())


class TestAsASource:
    """The manifest as the next run's table."""

    async def test_the_rows_of_the_first_run_are_restored(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """Number, id, request with its seed, carried columns, and a row's error; also from the bucket."""
        records = [_record(4, "skipped_budget"), _record(2, "failed"), _record(1), _record(3, "invalid")]
        manifest = await _write(bucket, tmp_path, *records)
        rows = [
            Row(n, f"id-{n}", ImageRequest(prompt=f"a boat {n} für dich", seed=n), {"sku": f"{n:03}"})
            for n in (1, 2, 4)
        ]
        invalid = Row(3, "id-3", None, {"sku": "003"}, "what happened")
        assert list(read_table(manifest.path)) == [*rows[:2], invalid, rows[2]]
        async with open_table(manifest.uri, bucket=bucket, only="unpublished") as table:
            assert list(table.rows()) == list(table.rows()) == rows[1:]


class GatedBucket(ImageBucket):
    """A bucket that counts its uploads and holds them until a gate opens."""

    _block_type_slug: ClassVar[str | None] = "gated-bucket"
    _gate: anyio.Event = PrivateAttr(default_factory=anyio.Event)
    _running: int = PrivateAttr(default=0)
    _most: int = PrivateAttr(default=0)
    _uploads: int = PrivateAttr(default=0)
    _begun: anyio.Event = PrivateAttr(default_factory=anyio.Event)

    async def put_file(self, path: str, file: Any, *, content_type: str, cache_control: str) -> None:
        """Wait for the gate, then upload."""
        self._running += 1
        self._uploads += 1
        self._begun.set()
        self._most = max(self._most, self._running)
        await self._gate.wait()
        await super().put_file(path, file, content_type=content_type, cache_control=cache_control)
        self._running -= 1


class MeasuringBucket(ImageBucket):
    """A bucket that notes the sizes of what it is sent by path, and stores nothing."""

    _block_type_slug: ClassVar[str | None] = "measuring-bucket"
    _sent: dict[str, list[int]] = PrivateAttr(default_factory=dict)

    async def put_file(self, path: str, file: Any, *, content_type: str, cache_control: str) -> None:  # noqa: ARG002
        """Count the bytes."""
        self._sent.setdefault(path, []).append(len(file.read()))


@pytest.fixture
def gated(bucket: ImageBucket) -> GatedBucket:
    """The bucket, with a gate."""
    return GatedBucket(
        **{name: getattr(bucket, name) for name in ImageBucket.model_fields if name != "block_type_slug"}
    )


class TestWhileItGrows:
    """The manifest in the bucket during the run."""

    async def test_it_is_uploaded_at_intervals(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """In the background, with the records so far; not again while there are no new ones."""
        async with ManifestWriter(bucket, RUN, tmp_path, upload_every=0.05) as manifest:
            manifest.append(_record(2))
            await _until(lambda: self._has_uploaded(bucket, [2]))
            first = _head(bucket, f"manifests/{RUN}/manifest.jsonl")
            await anyio.sleep(0.2)
            assert _head(bucket, f"manifests/{RUN}/manifest.jsonl")["LastModified"] == first["LastModified"]
            assert first["CacheControl"] == "no-cache"
            manifest.append(_record(1))
            await _until(lambda: self._has_uploaded(bucket, [2, 1]))
            with pytest.raises(ValueError, match="There is no object"):
                await bucket.read_path("manifests/latest.jsonl")

    async def test_a_long_run_sends_its_manifest_three_times_at_most(self, tmp_path: Path) -> None:
        """However often the interval ends: here after every record, as in a run of 1,500 slow rows."""
        bucket = MeasuringBucket(bucket_name="images", prefix="measured")
        async with ManifestWriter(bucket, RUN, tmp_path, upload_every=0.0) as manifest:
            for row in range(1, 1501):
                manifest.append(_record(row))
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
        size = manifest.path.stat().st_size
        sent = bucket._sent[f"manifests/{RUN}/manifest.jsonl"]
        assert len(sent) > 5
        assert sent[-1] == size
        assert sum(sent) <= 3 * size
        assert len(bucket._sent[f"manifests/{RUN}/manifest.parquet"]) == 1

    async def test_nothing_is_uploaded_before_the_interval_ends(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """A short run uploads at its end, or on `flush`."""
        async with ManifestWriter(bucket, RUN, tmp_path) as manifest:
            manifest.append(_record(1))
            await anyio.sleep(0.1)
            assert await self._has_uploaded(bucket, [])
            await manifest.flush()
            assert await self._has_uploaded(bucket, [1])

    async def test_appends_never_wait_and_uploads_never_overlap(self, gated: GatedBucket, tmp_path: Path) -> None:
        """Records are appended while an upload hangs; the next upload waits for it and includes them."""
        async with ManifestWriter(gated, RUN, tmp_path, upload_every=0.01) as manifest:
            manifest.append(_record(1))
            try:
                with anyio.fail_after(10):
                    await gated._begun.wait()
                for row in range(2, 50):
                    manifest.append(_record(row))
                waiting = asyncio.create_task(manifest.flush())
                await anyio.sleep(0.1)
                assert gated._uploads == 1
                assert len(list(read_manifest(manifest.path))) == 49
            finally:
                gated._gate.set()
            await waiting
            assert len(await _lines(gated)) == 49
        assert gated._most == 1

    async def test_a_failed_upload_is_retried_at_the_next_interval(
        self, bucket: ImageBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The run continues, and the failure is logged."""
        later = bucket.model_copy(update={"bucket_name": f"later-{bucket.prefix}"})
        with caplog.at_level(logging.WARNING):
            async with ManifestWriter(later, RUN, tmp_path, upload_every=0.05) as manifest:
                manifest.append(_record(1))

                async def is_logged() -> bool:
                    return bool(caplog.messages)

                await _until(is_logged)
                assert "The manifest could not be uploaded; the upload will be retried." in caplog.messages[0]
                manifest.append(_record(2))
                await asyncio.to_thread(lambda: bucket.get_client().create_bucket(Bucket=later.bucket_name))
                await _until(lambda: self._has_uploaded(later, [1, 2]))

    async def test_a_busy_bucket_is_tried_again_at_the_end(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """A run whose images are all published does not fail for a server that asks to slow down."""
        with self._busy(bucket, refusals=4) as busy:
            await _write(busy, tmp_path, _record(1))
        for path in (f"manifests/{RUN}/manifest.jsonl", "manifests/latest.jsonl"):
            assert [line["row"] for line in await _lines(bucket, path)] == [1]

    async def test_patience_with_a_busy_bucket_ends(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """The error then says where the manifest is."""
        with self._busy(bucket, refusals=1000) as busy, pytest.raises(BucketUnavailable, match="SlowDown") as failure:
            async with ManifestWriter(busy, RUN, tmp_path, patience=0.0) as manifest:
                manifest.append(_record(1))
        assert f"The complete manifest is in {tmp_path}" in failure.value.message

    @contextmanager
    def _busy(self, bucket: ImageBucket, *, refusals: int) -> Iterator[ImageBucket]:
        """The bucket behind a server that refuses the first writes of copies: each try of ours is three of boto3's."""
        left = refusals

        def meddle(request: Passing) -> Answer:
            nonlocal left
            if request.method == "PUT" and "latest.jsonl" in request.path and left:
                left -= 1
                return Answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>")
            return request.forward()

        assert bucket.endpoint_url is not None
        with open_proxy(bucket.endpoint_url) as proxy:
            proxy.meddle = meddle
            fields = {name: getattr(bucket, name) for name in ImageBucket.model_fields}
            yield ImageBucket.model_validate({**fields, "endpoint_url": proxy.url})

    async def test_a_failure_of_the_last_upload_is_raised(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """The error has the path of the complete local manifest."""
        nowhere = bucket.model_copy(update={"bucket_name": "nowhere"})
        with pytest.raises(BucketMissing, match=f"The complete manifest is in .*{RUN}.jsonl") as failure:
            await _write(nowhere, tmp_path, _record(1))
        assert failure.value.fatal
        assert len(list(read_manifest(tmp_path / f"{RUN}.jsonl"))) == 1

    async def test_the_runs_own_error_comes_first(
        self, bucket: ImageBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The manifest is still closed; a failure to do so is logged."""
        with pytest.raises(RuntimeError, match="the run broke"):
            await self._break(bucket, tmp_path / "1")
        assert [line["row"] for line in await _lines(bucket, "manifests/latest.jsonl")] == [1]
        with pytest.raises(RuntimeError, match="the run broke"):
            await self._break(bucket.model_copy(update={"bucket_name": "nowhere"}), tmp_path / "2")
        assert "'nowhere' does not exist" in caplog.messages[-1]

    @pytest.mark.parametrize("native", [False, True])
    async def test_a_cancelled_run_closes_its_manifest(
        self, bucket: ImageBucket, tmp_path: Path, *, native: bool
    ) -> None:
        """Complete and in order; the cancellation then continues."""

        async def work() -> None:
            async with ManifestWriter(bucket, RUN, tmp_path) as manifest:
                manifest.append(_record(2))
                manifest.append(_record(1))
                await anyio.sleep(60)

        if native:
            task = asyncio.create_task(work())
            await anyio.sleep(0.1)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert task.cancelled()
        else:
            with anyio.move_on_after(0.1) as scope:
                await work()
            assert scope.cancelled_caught
        assert [line["row"] for line in await _lines(bucket, "manifests/latest.jsonl")] == [1, 2]

    async def _has_uploaded(self, bucket: ImageBucket, rows: list[int]) -> bool:
        try:
            return [line["row"] for line in await _lines(bucket)] == rows
        except (ValueError, BucketMissing):
            return not rows

    async def _break(self, bucket: ImageBucket, folder: Path) -> None:
        async with ManifestWriter(bucket, RUN, folder) as manifest:
            manifest.append(_record(1))
            raise RuntimeError("the run broke")


_KILLED = """
import asyncio, sys
from pathlib import Path
from flux_prefect.manifest.writer import ManifestWriter
from flux_prefect.tables.manifest_lines import repair_last_line
from flux_prefect.manifest.report import ItemRecord
from flux_prefect.bucket.image_bucket import ImageBucket

async def main(folder, uri):
    async with ManifestWriter(ImageBucket.from_uri(uri), "0b9f5c8e-run", Path(folder), upload_every=0.02) as manifest:
        for row in range(1, 1_000_000):
            manifest.append(ItemRecord(row=row, id=str(row), status="failed", request=None, message="m" * 500))
            await asyncio.sleep(0.0002)

asyncio.run(main(*sys.argv[1:]))
"""


class TestKilled:
    """Manifests of killed runs and full disks."""

    async def test_a_killed_writer_leaves_complete_records_locally_and_in_the_bucket(
        self, sandbox: RunningSandbox, bucket: ImageBucket, tmp_path: Path
    ) -> None:
        """After kill -9 the file and the object can be read, no other file is left, and the run can be continued."""
        path = tmp_path / f"{RUN}.jsonl"
        process = await anyio.open_process(
            [sys.executable, "-c", _KILLED, str(tmp_path), bucket.uri],
            env=os.environ | sandbox.environment,
            stdin=subprocess.DEVNULL,
            stdout=None,
            stderr=None,
        )

        async def is_under_way() -> bool:
            assert process.returncode is None
            with suppress(ValueError):
                return len(await _lines(bucket)) >= 200
            return False

        async with process:
            try:
                await _until(is_under_way)
            finally:
                process.kill()
        local, uploaded = list(read_manifest(path)), await _lines(bucket)
        assert [line["row"] for line in local] == list(range(1, len(local) + 1))
        assert local[: len(uploaded)] == uploaded
        assert len(uploaded) >= 200
        assert list(tmp_path.iterdir()) == [path]
        await _write(bucket, tmp_path, _record(len(local) + 1))
        assert [line["row"] for line in await _lines(bucket)] == list(range(1, len(local) + 2))

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
    @given(data=st.data())
    def test_a_file_cut_off_anywhere_is_read_up_to_there(self, tmp_path: Path, data: st.DataObject) -> None:
        """All complete records are read, and after the repair more can be appended."""
        written = b"".join(map(_line, range(1, 5)))
        place = data.draw(st.integers(0, len(written)))
        path = tmp_path / f"{RUN}.jsonl"
        path.write_bytes(written[:place])
        complete = written[: place + 1].count(b"\n")  # a record is complete where only its line break is missing
        assert [record["row"] for record in read_manifest(path)] == list(range(1, complete + 1))

        repair_last_line(path)
        with path.open("ab") as file:
            file.write(_line(9))
        assert [record["row"] for record in read_manifest(path)] == [*range(1, complete + 1), 9]

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
    @given(content=st.binary(max_size=200))
    def test_any_content_is_records_or_a_table_error(self, tmp_path: Path, content: bytes) -> None:
        """No other exception is raised."""
        path = tmp_path / "manifest.jsonl"
        path.write_bytes(content)
        with suppress(TableError):
            list(read_manifest(path))

    async def test_a_full_disk_leaves_complete_records(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """The error has the path; the file ends with a complete record, and can grow once there is space again."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        async with ManifestWriter(bucket, RUN, tmp_path) as manifest:
            manifest.append(_record(1))
            try:
                for room in (10, 0):
                    size = manifest.path.stat().st_size
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
                    with pytest.raises(ManifestUnwritable, match=f"{RUN}.jsonl can't be written .*free space"):
                        manifest.append(_record(2))
                    assert manifest.path.stat().st_size == size
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            manifest.append(_record(3))
        assert [line["row"] for line in await _lines(bucket)] == [1, 3]

    async def test_an_unwritable_folder_is_reported_at_once(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """Before anything is paid for."""
        (tmp_path / "file").write_text("")
        with pytest.raises(ManifestUnwritable, match="use another folder"):
            await _write(bucket, tmp_path / "file")


class TestLongRuns:
    """Ten thousand rows."""

    async def test_memory_stays_flat(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """10,000 records take the memory of the row index and one batch of columns, under 8 MB."""
        await bucket.check()  # loads boto3's own descriptions of S3, 12 MB
        template = _record(1)
        tracemalloc.start()
        try:
            async with ManifestWriter(bucket, RUN, tmp_path) as manifest:
                for row in reversed(range(1, 10_001)):
                    manifest.append(template.model_copy(update={"row": row, "id": f"id-{row}"}))
                await manifest.flush()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8e6
        assert (await _columns(bucket))["row"].to_pylist() == list(range(1, 10_001))
        assert sum(1 for _ in read_manifest(manifest.path)) == 10_000
