"""What leaves the spool and what never does."""

from __future__ import annotations

import base64
import os
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from PIL import Image
from support.image_kinds import KINDS, save

from flux_prefect.api.models import GeneratedImage, Generation, ImageRequest
from flux_prefect.errors import Billed, ContentFlagged, InvalidResponse, UnexpectedSize
from flux_prefect.host.locks import HostLockManager
from flux_prefect.host.retention import shrink, shrink_at_times
from flux_prefect.host.spool import ImageFile, PaidCall, Spool

ENDPOINT = "https://api.aimlapi.com"
IMAGE = KINDS["plain"]
INLINE = f"data:image/jpeg;base64,{base64.b64encode(IMAGE).decode()}"
HOURS = 3600.0


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """A spool that is ready."""
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    return spool


@pytest.fixture
def locks(tmp_path: Path) -> HostLockManager:
    """The locks of the process that sweeps."""
    return HostLockManager(tmp_path / "locks")


def _keep(
    spool: Spool, seed: int = 1, content: bytes | None = IMAGE, images: int = 1, url: str = "https://cdn.example/0.jpg"
) -> Generation:
    """A paid answer, with its first image downloaded."""
    request = ImageRequest(prompt="a lighthouse", seed=seed, num_images=images)
    generation = Generation(
        request=request,
        endpoint=ENDPOINT,
        fingerprint=request.fingerprint(ENDPOINT),
        images=tuple(GeneratedImage(index=index, url=url) for index in range(images)),
        seed=seed,
        client_request_id=f"fp-{seed}",
        created_at=datetime.now(timezone.utc),
    )
    spool.keep_generation(generation)
    if content is not None:
        spool.keep_image(generation, 0, content)
    return generation


def _publish(spool: Spool, generation: Generation) -> None:
    found = spool.find_image(generation, 0)
    assert found is not None
    spool.note_published(ImageFile(**found.model_dump(), index=0, generation=generation), {"bucket": "b"})


def _age(spool: Spool, hours: float) -> None:
    """Let time pass for every file."""
    for path in spool.root.rglob("*"):
        moment = path.stat().st_mtime - hours * HOURS
        os.utime(path, (moment, moment))


def _size(spool: Spool) -> int:
    return sum(path.stat().st_size for path in spool.root.rglob("*") if path.is_file())


def _names(spool: Spool, folder: str) -> list[str]:
    return sorted(path.name for path in (spool.root / folder).iterdir())


def test_what_is_published_leaves(spool: Spool, locks: HostLockManager) -> None:
    """The files after two days, the records after a month."""
    for seed in range(1, 21):
        _publish(spool, _keep(spool, seed))
    before = _size(spool)
    shrink(spool, locks)
    assert _size(spool) == before

    _age(spool, 49)
    shrink(spool, locks)
    assert _names(spool, "pictures") == []
    assert len(_names(spool, "records")) == len(_names(spool, "published")) == 20
    assert _size(spool) < 20 * 2500

    _age(spool, 30 * 24)
    shrink(spool, locks)
    assert _size(spool) == 0


def test_inline_bytes_leave_with_the_file(spool: Spool, locks: HostLockManager) -> None:
    """They are in the record of the answer."""
    generation = _keep(spool, url=INLINE)
    _publish(spool, generation)
    _age(spool, 49)
    shrink(spool, locks)
    kept = spool.find_generation(generation.fingerprint)
    assert kept is not None
    assert kept.images[0].url is None
    assert _size(spool) < 2500


def test_what_is_not_published_never_leaves(spool: Spool, locks: HostLockManager) -> None:
    """Open calls, answers, images on their way, and the other images of a request."""
    answered, fetched, two = _keep(spool, 1, content=None), _keep(spool, 2), _keep(spool, 3, images=2)
    _publish(spool, two)
    call = PaidCall(
        client_request_id="fp-9",
        fingerprint=two.fingerprint,
        endpoint=ENDPOINT,
        sent_at=datetime.now(timezone.utc),
        task_run_id=None,
    )
    spool.open_call(call)
    spool.leave_open(call, InvalidResponse("lost", billed=Billed.YES))
    _age(spool, 10_000)
    shrink(spool, locks)
    assert [spool.find_generation(kept.fingerprint) for kept in (answered, fetched, two)] == [answered, fetched, two]
    assert spool.image_path(fetched, 0).read_bytes() == IMAGE
    assert not spool.image_path(two, 0).exists()
    assert [lost.client_request_id for lost in spool.open_calls()] == ["fp-9"]


def test_an_image_that_is_paid_for_anew_counts_as_unpublished(spool: Spool, locks: HostLockManager) -> None:
    """Whatever became of the one that it replaces."""
    old = _keep(spool)
    _publish(spool, old)
    new = old.model_copy(update={"client_request_id": "fp-2"})
    spool.keep_generation(new)
    spool.keep_image(new, 0, IMAGE)
    _age(spool, 10_000)
    shrink(spool, locks)
    assert spool.image_path(new, 0).exists()
    assert spool.find_generation(new.fingerprint) == new


def test_an_image_that_is_fetched_anew_stays(spool: Spool, locks: HostLockManager) -> None:
    """Its file is young, and its publication is forgotten."""
    generation = _keep(spool)
    _publish(spool, generation)
    _age(spool, 10_000)
    spool.keep_image(generation, 0, IMAGE)
    shrink(spool, locks)
    assert spool.image_path(generation, 0).exists()
    spool.forget_published(generation, 0)
    _age(spool, 10_000)
    shrink(spool, locks)
    assert spool.image_path(generation, 0).exists()


def test_a_file_in_use_stays(spool: Spool, locks: HostLockManager) -> None:
    """Each use counts anew, on whatever host that shares the spool; no lock is needed."""
    generation = _keep(spool)
    _publish(spool, generation)
    _age(spool, 49)
    assert spool.find_image(generation, 0) is not None
    shrink(spool, locks)
    assert spool.image_path(generation, 0).exists()


@pytest.mark.parametrize("key", ["produce", "generate"])
def test_what_another_process_works_on_stays(spool: Spool, locks: HostLockManager, tmp_path: Path, key: str) -> None:
    """It has the lock of the request, in whichever density and task."""
    generation = _keep(spool)
    _publish(spool, generation)
    _age(spool, 10_000)
    other = HostLockManager(tmp_path / "locks")
    assert other.acquire_lock(f"{key}-{generation.fingerprint}", "another run")
    shrink(spool, locks)
    assert spool.image_path(generation, 0).exists()
    assert spool.find_generation(generation.fingerprint) == generation
    other.release_lock(f"{key}-{generation.fingerprint}", "another run")
    shrink(spool, locks)
    assert not spool.image_path(generation, 0).exists()


def test_many_may_sweep_at_once(spool: Spool, tmp_path: Path) -> None:
    """One does; the others go on with their work."""
    for seed in range(1, 9):
        _publish(spool, _keep(spool, seed))
    kept = _keep(spool, 9)
    _age(spool, 49)
    threads = [threading.Thread(target=shrink, args=(spool, HostLockManager(tmp_path / "locks"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _names(spool, "pictures") == [spool.image_path(kept, 0).name]


def test_a_run_of_many_images_sweeps_once_an_hour(spool: Spool, locks: HostLockManager) -> None:
    """So that the three tasks by themselves shrink it as well, and pay for it with one look at a file."""
    _publish(spool, _keep(spool, 1))
    _age(spool, 49)
    shrink_at_times(spool, locks)
    assert _names(spool, "pictures") == []

    _publish(spool, _keep(spool, 2))
    for path in (spool.root / "pictures", spool.root / "published"):
        for file in path.iterdir():
            os.utime(file, (time.time() - 49 * HOURS,) * 2)
    shrink_at_times(spool, locks)
    assert len(_names(spool, "pictures")) == 1
    _age(spool, 2)
    shrink_at_times(spool, locks)
    assert _names(spool, "pictures") == []


@pytest.mark.parametrize("fault", ["placeholder", "black"])
def test_of_a_rejected_image_the_reason_stays(fault: str, spool: Spool, locks: HostLockManager) -> None:
    """So that it is not fetched or paid for again, a month later."""
    wrong = save(Image.new("RGB", (120, 90) if fault == "placeholder" else (464, 256)), "JPEG")
    if fault == "placeholder":
        wrong = save(Image.new("RGB", (120, 90), "gray"), "JPEG")
    generation = _keep(spool, content=wrong)
    spool.reject(generation, 0)
    shrink(spool, locks)
    assert spool.rejected_path(generation, 0).read_bytes() == wrong

    _age(spool, 31 * 24)
    shrink(spool, locks)
    assert b"verdict" in spool.rejected_path(generation, 0).read_bytes()
    assert spool.find_generation(generation.fingerprint) == generation
    for _ in range(2):
        with pytest.raises(UnexpectedSize if fault == "placeholder" else ContentFlagged) as raised:
            spool.reconsider(generation, 0, None)
        assert not raised.value.retryable
        _age(spool, 31 * 24)
        shrink(spool, locks)


@pytest.mark.parametrize("hours", ["1", "1000"])
def test_the_time_is_a_setting(
    hours: str, spool: Spool, locks: HostLockManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For those with a small disk, and those with a large one."""
    monkeypatch.setenv("FLUX_PREFECT_KEEP_PUBLISHED_HOURS", hours)
    _publish(spool, _keep(spool))
    _age(spool, 49)
    shrink(spool, locks)
    assert len(_names(spool, "pictures")) == (0 if hours == "1" else 1)


def test_a_spool_that_can_not_be_swept_stops_nothing(tmp_path: Path, locks: HostLockManager) -> None:
    """It is missing, or a file."""
    shrink(Spool(tmp_path / "missing"), locks)
    (tmp_path / "file").touch()
    shrink(Spool(tmp_path / "file"), locks)
    shrink_at_times(Spool(tmp_path / "file"), locks)
