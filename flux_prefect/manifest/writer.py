"""Writing the manifest of a run: a record for every row, in the bucket beside the images.

<prefix>/manifests/<run>/manifest.jsonl     partial during the run, complete at its end
<prefix>/manifests/<run>/manifest.parquet   at the end, where pyarrow is installed
<prefix>/manifests/latest.jsonl, .parquet   copies of the manifest of the run that ended last
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import anyio
import anyio.to_thread
from typing_extensions import Self

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import BucketError, BucketUnavailable, ManifestUnwritable, TableError
from flux_prefect.manifest.parquet import IMAGE_COLUMNS, write_parquet
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.tables.file_views import open_view
from flux_prefect.tables.manifest_lines import VERSION, ordered_lines, repair_last_line
from flux_prefect.tables.parquet import has_pyarrow, load_pyarrow

__all__ = ["ManifestWriter", "record_line"]

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 30.0
"""The shortest time between two uploads of a growing manifest, in seconds."""

_GROWTH = 2
"""How much larger a growing manifest must be than at its last upload. All its uploads together then send, with the
one at the end, at most three times its final size."""

CLOSE_SECONDS = 120.0
"""How long the whole manifest is offered to a bucket that is unavailable when the run ends."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0
_JSONL, _PARQUET = "application/x-ndjson", "application/vnd.apache.parquet"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ManifestWriter:
    """Writer of a run's manifest. Use it with `async with`, and only one at a time for each run.

    When `append` returns, the record is complete in the local file and survives a kill of the process. The growing file
    is uploaded to the bucket in the background whenever its size has doubled, and in the table's order at the end: of a
    killed run the local file has every record, the bucket more than half of them. A writer that is opened again for
    the same run appends to its file; of several records of a row the last one counts.

    Args:
        bucket: where the images are.
        run: the flow run's id; part of the key.
        folder: the folder of the local file, created where it is missing. The file is never removed.
        upload_every: the shortest time between two uploads of a growing manifest, in seconds.
        patience: seconds for which an upload at the end is repeated while the bucket is unavailable.
        copies: the name of the copies for the run that ended last; None for a run that is part of another one.
    """

    def __init__(  # noqa: PLR0913 - options, each with its name
        self,
        bucket: ImageBucket,
        run: str,
        folder: Path,
        *,
        upload_every: float = UPLOAD_SECONDS,
        patience: float = CLOSE_SECONDS,
        copies: str | None = "latest",
    ) -> None:
        if not _PLAIN_NAME.fullmatch(run):
            raise ValueError(f"run {run!r} can't be part of a key: use letters, digits, dots, hyphens, underscores")
        self.path = folder / f"{run}.jsonl"
        self._bucket = bucket
        self._run = run
        self._upload_every = upload_every
        self._patience = patience
        self._copies = copies
        self._uploading = anyio.Lock()
        self._uploaded = 0
        self._size = 0
        self._with_parquet = False

    @property
    def uri(self) -> str:
        """The address of the JSON Lines: `s3://bucket/prefix/manifests/run/manifest.jsonl`."""
        return f"{self._bucket.uri}/manifests/{self._run}/manifest.jsonl"

    async def __aenter__(self) -> Self:
        try:
            self._file = await anyio.to_thread.run_sync(_open, self.path)
        except OSError as error:
            raise self._unwritable(error) from error
        self._size = self._file.tell()
        self._closing = asyncio.Event()
        self._background = asyncio.create_task(self._upload_while_open())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            try:
                if error is not None:
                    self._patience = 0.0  # a process that is to end may have seconds left
                await self.close()
            except (BucketError, ManifestUnwritable) as failure:
                if error is None:
                    raise
                logger.error("%s", failure.message)  # noqa: TRY400 - the run's own error is raised instead

    def append(self, record: ItemRecord) -> None:
        """Write a record. Takes about 50 microseconds, and does not wait for the disk or the bucket.

        Raises:
            ManifestUnwritable: the local file can't be written. It still ends with a complete record.
        """
        line = record_line(record, self._run)
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._unwritable(error) from error
        if written < len(line):  # a write to a full disk is partial
            self._file.truncate(self._size)
            raise self._unwritable(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        self._size += len(line)

    async def verify_upload(self) -> None:
        """Upload the manifest now, even if it is empty, to verify that the bucket accepts it.

        Called before anything is paid for.

        Raises:
            BucketError: the upload failed.
        """
        async with self._uploading:
            await self._upload()

    async def flush(self) -> None:
        """Upload the manifest now if it has grown since the last upload, in the order in which rows ended.

        Raises:
            BucketError: the upload failed. The local file has all records.
        """
        async with self._uploading:
            if self._size > self._uploaded:
                await self._upload()

    async def close(self) -> None:
        """Upload the complete manifest in the table's order and in every format. A second call does nothing.

        A bucket that is unavailable or asks for patience is tried again for `patience` seconds.

        Raises:
            BucketError: an upload failed. The local file has all records.
            ManifestUnwritable: there is no space for a sorted copy of it.
        """
        if self._file.closed:
            return
        self._closing.set()
        await self._background
        self._file.close()
        try:
            await self._finish()
        except BucketError as error:
            raise type(error)(f"{error.message} The complete manifest is in {self.path}.") from error
        except OSError as error:
            raise self._unwritable(error) from error

    async def _upload_while_open(self) -> None:
        # Importing pyarrow takes time: do it while the first calls are waiting for their answers.
        self._with_parquet = await anyio.to_thread.run_sync(_can_write_parquet)
        while not self._closing.is_set():
            with anyio.move_on_after(self._upload_every):
                await self._closing.wait()
                return
            if self._size < _GROWTH * self._uploaded:
                continue
            try:
                await self.flush()
            except BucketError as error:
                logger.warning("The manifest could not be uploaded; the upload will be retried. %s", error.message)

    async def _upload(self) -> None:
        size = self._size
        with self.path.open("rb") as file:
            await self._put(file, f"{self._run}/manifest.jsonl", _JSONL)
        self._uploaded = size

    async def _finish(self) -> None:
        folder = self.path.parent
        with tempfile.TemporaryFile(dir=folder) as lines, tempfile.TemporaryFile(dir=folder) as columns:
            put = partial(self._put_patiently, anyio.current_time() + self._patience)
            await anyio.to_thread.run_sync(_order, self.path, lines)
            await put(lines, f"{self._run}/manifest.jsonl", _JSONL)
            if self._with_parquet:
                await anyio.to_thread.run_sync(write_parquet, partial(_iterate, lines), columns)
                await put(columns, f"{self._run}/manifest.parquet", _PARQUET)
                if self._copies is not None:
                    await put(columns, f"{self._copies}.parquet", _PARQUET)
            if self._copies is not None:
                await put(lines, f"{self._copies}.jsonl", _JSONL)

    async def _put_patiently(self, deadline: float, file: BinaryIO, name: str, content_type: str) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                return await self._put(file, name, content_type)
            except BucketUnavailable as error:
                if anyio.current_time() + pause > deadline:
                    raise
                logger.warning("The manifest is not uploaded yet, and will be tried again. %s", error.message)
            await anyio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _put(self, file: BinaryIO, name: str, content_type: str) -> None:
        """Upload a file's present content under a name, without bytes that are appended meanwhile."""
        file.flush()
        size = os.fstat(file.fileno()).st_size
        with open_view(file, size) as content:
            await self._bucket.put_file(
                f"manifests/{name}", content, content_type=content_type, cache_control="no-cache"
            )

    def _unwritable(self, error: OSError) -> ManifestUnwritable:
        return ManifestUnwritable(
            f"The manifest {self.path} can't be written ({error.strerror or error}): free space in its folder, or "
            "use another folder, then run again."
        )


def record_line(record: ItemRecord, run: str) -> bytes:
    """Encode a record as a line of the manifest."""
    content: dict[str, Any] = {"manifest": VERSION, **record.model_dump(mode="json"), "run": run}
    image = content["images"][0] if content["images"] else {}
    content |= {name: image.get(name) for name in IMAGE_COLUMNS}
    content["seed"] = None if record.request is None else record.request.seed
    # A message of the service can contain a lone surrogate, which UTF-8 can't encode.
    return json.dumps(content, ensure_ascii=False).encode(errors="replace") + b"\n"


def _can_write_parquet() -> bool:
    """Check whether the Parquet file can be written. Never raises: the JSON Lines have all that was paid for."""
    if not has_pyarrow():
        return False
    try:
        load_pyarrow()
    except TableError as error:
        logger.warning(
            "The manifest is written only as JSON Lines: pyarrow is installed but can't be loaded. %s", error
        )
        return False
    return True


def _open(path: Path) -> io.FileIO:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        repair_last_line(path)
    return path.open("ab", buffering=0)


def _order(path: Path, ordered: BinaryIO) -> None:
    with path.open("rb") as file:
        ordered.writelines(ordered_lines(file, str(path)))
    ordered.flush()


def _iterate(lines: BinaryIO) -> Iterator[dict[str, Any]]:
    with open_view(lines, os.fstat(lines.fileno()).st_size) as file:
        for line in file:
            yield json.loads(line)
