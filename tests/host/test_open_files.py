"""A process that may open no more files says so, and blames no folder. The limit is the real one."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishingRun
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import download, generate, recover
from flux_prefect.errors import ImageUnwritable, LocksUnusable, SpoolUnreadable, SpoolUnwritable
from flux_prefect.host.locks import HostLockManager
from flux_prefect.host.spool import Spool
from flux_prefect.local_files import explain_os_error
from flux_prefect.sandbox.launching import RunningSandbox

REMEDY = r"\(Too many open files\): this process has .* \(ulimit -n\), or lower max_in_flight"


@contextmanager
def no_more_files() -> Iterator[None]:
    """Inside the block, every file that is opened is one too many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_spool_names_the_limit(tmp_path: Path) -> None:
    """Another folder would not help."""
    with no_more_files(), pytest.raises(SpoolUnwritable, match=f"can't be written {REMEDY}") as refused:
        Spool(tmp_path).prepare()
    assert "FLUX_PREFECT_SPOOL" not in refused.value.message


async def test_nothing_is_paid_for_what_the_spool_may_hold(
    tmp_path: Path, credentials: AimlApiCredentials, sandbox: RunningSandbox
) -> None:
    """A record that can't be opened just now is not taken for none."""
    request, spool = ImageRequest(prompt=uuid4().hex, seed=1), Spool(tmp_path)
    async with credentials.get_client() as client:
        await generate(request, client, spool)
    before = sandbox.control.summary().billed_calls
    with no_more_files(), pytest.raises(SpoolUnreadable, match=f"can't be read {REMEDY}"):
        recover(request, credentials.base_url, spool)

    assert recover(request, credentials.base_url, spool) is not None
    assert sandbox.control.summary().billed_calls == before


def test_a_lock_names_the_limit(tmp_path: Path) -> None:
    """The folder is as good as any."""
    with no_more_files(), pytest.raises(LocksUnusable, match=f"can't be used {REMEDY}") as refused:
        HostLockManager(tmp_path).acquire_lock("key", "holder")
    assert "FLUX_PREFECT_LOCKS" not in str(refused.value)


async def test_a_download_names_the_limit(tmp_path: Path, credentials: AimlApiCredentials) -> None:
    """There is room in the folder."""
    async with credentials.get_client() as client:
        with no_more_files(), pytest.raises(ImageUnwritable, match=f"could not be written {REMEDY}") as refused:
            await client.download("data:image/png;base64,AAAA", tmp_path / "image.png", expected="png")
    assert "make room" not in refused.value.message


async def test_an_upload_names_the_limit(tmp_path: Path, credentials: AimlApiCredentials, bucket: ImageBucket) -> None:
    """The image stays where it is, and is published once there are files again."""
    spool = Spool(tmp_path)
    async with credentials.get_client() as client:
        generation = await generate(ImageRequest(prompt=uuid4().hex, seed=1), client, spool)
        file = await download(generation, 0, client, spool)
    await bucket.check()  # so that there is a connection
    with no_more_files(), pytest.raises(SpoolUnreadable, match=f"can't be read {REMEDY}") as refused:
        await bucket.publish(file, PublishingRun())

    assert refused.value.retryable
    assert (await bucket.publish(file, PublishingRun())).created


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENFILE, "(Too many open files in system): the whole machine has"),
        (errno.ENOSPC, "(No space left on device): take another folder"),
    ],
)
def test_the_remedy_is_that_of_the_failure(number: int, expected: str) -> None:
    """A machine that is out of files is not a process that is, and a full disk is neither."""
    assert explain_os_error(OSError(number, os.strerror(number)), "take another folder").startswith(expected)
