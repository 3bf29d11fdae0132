from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest
from PIL import Image

from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest, OutputFormat
from flux_prefect.errors import AnswerLost, Billed, EmptyGeneration, FluxError, SpoolUnreadable, SpoolUnwritable
from flux_prefect.host.spool import ImageFile, PaidCall, Spool
from flux_prefect.local_files import open_part, part_path

NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
REQUEST = ImageRequest(prompt="a lighthouse", seed=7)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """A spool that is ready."""
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    return spool


def _call(number: int = 1, fingerprint: str = "f" * 32) -> PaidCall:
    return PaidCall(
        client_request_id=f"fp-{number}",
        fingerprint=fingerprint,
        endpoint="https://api.aimlapi.com",
        sent_at=NOON,
        task_run_id="run-1",
    )


def _generation(
    url: str = "https://cdn.example.com/1.jpg", fingerprint: str = "f" * 32, form: OutputFormat = "jpeg"
) -> Generation:
    return Generation(
        request=REQUEST.model_copy(update={"output_format": form}),
        endpoint="https://api.aimlapi.com",
        fingerprint=fingerprint,
        images=(GeneratedImage(index=0, url=url),),
        seed=7,
        client_request_id="fp-1",
        created_at=NOON,
    )


def _image(form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(buffer, form)
    return buffer.getvalue()


def _everything_in(spool: Spool) -> list[str]:
    return sorted(str(path.relative_to(spool.root)) for path in spool.root.rglob("*") if path.is_file())


class TestPaidCalls:
    """Notes of calls that may cost money."""

    def test_a_call_is_noted_until_its_end_is_known(self, spool: Spool) -> None:
        """Opened, it is found; closed, it is gone, and closing it again is no error."""
        spool.open_call(_call())
        assert spool.open_calls() == [_call()]
        assert spool.open_calls()[0].billed is Billed.UNKNOWN
        spool.close_call(_call())
        spool.close_call(_call())
        assert spool.open_calls() == []
        assert _everything_in(spool) == []

    def test_a_lost_answer_is_noted_with_its_reason(self, spool: Spool) -> None:
        """What is known of the cost, and how the answer was lost, stand in the note."""
        spool.open_call(_call(1))
        spool.open_call(_call(2))
        spool.leave_open(_call(1), AnswerLost("cut after 300 s"))
        spool.leave_open(_call(2), EmptyGeneration("no image", billed=Billed.YES))
        first, second = spool.open_calls()
        assert (first.billed, first.error) == (Billed.UNKNOWN, "cut after 300 s")
        assert (second.billed, second.error) == (Billed.YES, "no image")
        assert first.sent_at == NOON

    def test_the_calls_of_one_request_can_be_asked_for(self, spool: Spool) -> None:
        """Others are not among them."""
        for call in (_call(1, "a" * 32), _call(2, "b" * 32), _call(3, "a" * 32)):
            spool.open_call(call)
        assert [call.client_request_id for call in spool.open_calls("a" * 32)] == ["fp-1", "fp-3"]
        assert len(spool.open_calls()) == 3

    def test_a_spool_that_was_never_used_has_no_calls(self, tmp_path: Path) -> None:
        """Looking makes nothing and raises nothing."""
        assert Spool(tmp_path / "nowhere").open_calls() == []
        assert not (tmp_path / "nowhere").exists()

    def test_a_broken_note_hides_no_other(self, spool: Spool) -> None:
        """A note that can't be read is passed over."""
        spool.open_call(_call())
        (spool.root / "calls" / f"{'f' * 32}.fp-0.json").write_text('{"client_')
        assert spool.open_calls() == [_call()]

    def test_a_spool_that_went_away_does_not_hide_how_a_call_ended(self, spool: Spool) -> None:
        """Once the call is out, the spool's own troubles are not what is raised."""
        (spool.root / "calls").rmdir()
        (spool.root / "calls").touch()
        spool.leave_open(_call(), AnswerLost("cut"))
        spool.close_call(_call())


class TestUnreadable:
    """What is there and can't be read is an error before money, never a miss."""

    @pytest.mark.parametrize("folder", ["calls", "answers"])
    def test_a_folder_or_a_file_in_it(self, spool: Spool, folder: str) -> None:
        """The error names the path and says that nothing was sent."""
        look = spool.open_calls if folder == "calls" else spool.kept_answers
        loop = spool.root / folder / f"{'f' * 32}.fp-1.json"
        loop.symlink_to(loop)
        with pytest.raises(SpoolUnreadable, match=rf"{loop.name}.*nothing was sent"):
            look("f" * 32)
        loop.unlink()
        (spool.root / folder).rmdir()
        (spool.root / folder).touch()
        with pytest.raises(SpoolUnreadable, match=rf"{folder}.*nothing was sent"):
            look("f" * 32)


class TestGenerations:
    """Records of paid answers."""

    def test_a_record_is_found_again_whole(self, spool: Spool) -> None:
        """Inline bytes are in it."""
        generation = _generation(url="data:image/jpeg;base64,AAAA")
        spool.keep_generation(generation)
        assert spool.find_generation("f" * 32) == generation
        assert Spool(spool.root).find_generation("f" * 32) == generation
        assert spool.find_generation("e" * 32) is None

    def test_a_later_answer_replaces_an_earlier_one(self, spool: Spool) -> None:
        """An image that was paid for anew has a new URL."""
        spool.keep_generation(_generation(url="https://cdn.example.com/old.jpg"))
        spool.keep_generation(_generation(url="https://cdn.example.com/new.jpg"))
        found = spool.find_generation("f" * 32)
        assert found is not None
        assert found.images[0].url == "https://cdn.example.com/new.jpg"

    @pytest.mark.parametrize(
        "harm",
        [
            lambda path: path.write_bytes(path.read_bytes()[:-20]),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(b"\xff\xfe\x00"),
            lambda path: path.write_text('{"request": 1}'),
            lambda path: (path.unlink(), path.mkdir()),
            lambda path: path.unlink(),
        ],
    )
    def test_a_broken_record_is_none(self, spool: Spool, harm: Callable[[Path], object]) -> None:
        """A record that can't be read counts as not there."""
        spool.keep_generation(_generation())
        harm(spool.root / "records" / f"{'f' * 32}.json")
        assert spool.find_generation("f" * 32) is None

    def test_many_writers_of_one_record_leave_one_of_theirs(self, spool: Spool) -> None:
        """Concurrent readers find a whole record, and no partial file remains."""
        records = [_generation(url=f"https://cdn.example.com/{'x' * 20_000}{number}.jpg") for number in range(16)]
        spool.keep_generation(records[0])
        with ThreadPoolExecutor(8) as pool:
            writing = [pool.submit(spool.keep_generation, record) for record in records]
            seen = [spool.find_generation("f" * 32) for _ in range(20)]
            for future in writing:
                future.result()
        assert all(record in records for record in seen)
        assert spool.find_generation("f" * 32) in records
        assert _everything_in(spool) == [f"records/{'f' * 32}.json"]

    def test_a_crash_while_writing_leaves_the_old_record(self, spool: Spool) -> None:
        """What a write that never ended left behind is neither read nor in the way."""
        spool.keep_generation(_generation())
        record = spool.root / "records" / f"{'f' * 32}.json"
        record.with_name(f"{record.name}.part").write_text('{"half": ')
        assert spool.find_generation("f" * 32) == _generation()
        spool.keep_generation(_generation(url="https://cdn.example.com/new.jpg"))
        assert spool.find_generation("f" * 32) != _generation()

    def test_a_failed_write_leaves_the_old_record_and_no_part(self, spool: Spool) -> None:
        """The error is an OSError, raised to the caller, which still has the answer."""
        spool.keep_generation(_generation())
        blocked = _generation(fingerprint="e" * 32)
        (spool.root / "records" / f"{'e' * 32}.json").mkdir()
        with pytest.raises(OSError, match="directory"):
            spool.keep_generation(blocked)
        assert _everything_in(spool) == [f"records/{'f' * 32}.json"]


class TestImages:
    """Files of images."""

    @pytest.mark.parametrize(("form", "extension"), [("jpeg", "jpg"), ("png", "png")])
    def test_a_whole_image_is_found(self, spool: Spool, form: OutputFormat, extension: str) -> None:
        """It is measured anew, and its path names the request and the index."""
        generation = _generation(form=form)
        path = spool.image_path(generation, 2)
        assert path == spool.root / "pictures" / f"{'f' * 32}-2.{extension}"
        path.write_bytes(_image(form))

        found = spool.find_image(generation, 2)

        assert found is not None
        assert (found.format, found.width, found.height, found.black) == (form, 96, 64, False)
        assert found.size == path.stat().st_size
        assert found.path == path
        assert ImageFile(**found.model_dump(), index=2, generation=generation).is_whole()

    @pytest.mark.parametrize(
        "content",
        [None, b"", _image()[:-200], b"<html>gone</html>", _image("PNG")],
        ids=["missing", "empty", "cut", "html", "png"],
    )
    def test_anything_else_is_none(self, spool: Spool, content: bytes | None) -> None:
        """A missing, cut or wrong file counts as not there, so it is fetched again."""
        if content is not None:
            spool.image_path(_generation(), 0).write_bytes(content)
        assert spool.find_image(_generation(), 0) is None

    def test_a_file_that_lost_bytes_or_went_is_not_whole(self, spool: Spool) -> None:
        """is_whole looks at the file as it is now."""
        path = spool.image_path(_generation(), 0)
        path.write_bytes(_image())
        found = spool.find_image(_generation(), 0)
        assert found is not None
        file = ImageFile(**found.model_dump(), index=0, generation=_generation())
        path.write_bytes(_image()[:-1])
        assert not file.is_whole()
        path.unlink()
        assert not file.is_whole()


class TestFolder:
    """Where the spool is."""

    def test_the_setting_names_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """FLUX_PREFECT_SPOOL is obeyed at each use."""
        monkeypatch.setenv("FLUX_PREFECT_SPOOL", str(tmp_path / "here"))
        assert Spool().root == tmp_path / "here"

    def test_what_is_in_it_is_for_its_user_alone(self, spool: Spool) -> None:
        """Prompts and images can't be read by others."""
        assert {path.stat().st_mode & 0o777 for path in spool.root.iterdir()} == {0o700}

    def test_what_dead_processes_left_half_written_is_swept(self, spool: Spool) -> None:
        """And nothing of a living one, whose lock says so: process ids of another container would say nothing."""
        torn, live = (part_path(spool.root / "records" / "abc.json") for _ in range(2))
        open_part(torn).close()
        with open_part(live):
            spool.sweep()
            assert _everything_in(spool) == [f"records/{live.name}"]
        spool.sweep()
        assert _everything_in(spool) == []

    @pytest.mark.parametrize("name", ["abc.json.4711-0123abcd.part", "abc-0.jpg.part"])
    def test_what_has_no_lock_is_swept_after_a_day(self, spool: Spool, name: str) -> None:
        """Releases before the locks may still be writing it."""
        part = spool.root / "records" / name
        part.touch()
        spool.sweep()
        assert part.exists()
        os.utime(part, (time.time() - 25 * 3600,) * 2)
        spool.sweep()
        assert not part.exists()

    def test_preparing_twice_leaves_nothing_behind(self, spool: Spool) -> None:
        """The proof that it can be written is cleared away."""
        spool.prepare()
        assert sorted(path.name for path in spool.root.iterdir()) == [
            "answers",
            "calls",
            "endpoints",
            "pictures",
            "published",
            "records",
        ]

    @pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/flux"])
    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path, place: str) -> None:
        """The error has the folder and the setting, and stops a batch."""
        (tmp_path / "a file").touch()
        spool = Spool(tmp_path / place)
        with pytest.raises(SpoolUnwritable, match=rf"{place}.*FLUX_PREFECT_SPOOL") as refusal:
            spool.prepare()
        assert refusal.value.fatal
        assert not refusal.value.retryable
        assert refusal.value.billed is Billed.NO
        assert isinstance(refusal.value, FluxError)

    def test_a_call_that_cannot_be_noted_must_not_be_sent(self, spool: Spool) -> None:
        """open_call raises where the note could not be written."""
        (spool.root / "calls").rmdir()
        (spool.root / "calls").touch()
        with pytest.raises(SpoolUnwritable, match="FLUX_PREFECT_SPOOL"):
            spool.open_call(_call())
