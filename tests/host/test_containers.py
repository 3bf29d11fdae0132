"""Two containers that share a spool, and no process ids and no temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest
from support.containers import Container, open_container

from flux_prefect.sandbox.launching import RunningSandbox


@pytest.fixture
def pair(tmp_path: Path, sandbox: RunningSandbox) -> Iterator[tuple[Container, Container]]:
    """Both, with one spool and every other setting at its default."""
    shared = {
        "FLUX_PREFECT_SPOOL": str(tmp_path / "spool"),
        "AIMLAPI_KEY": sandbox.environment["AIMLAPI_KEY"],
        "AIMLAPI_BASE_URL": sandbox.url,
    }
    with ExitStack() as stack:
        one, two = (stack.enter_context(open_container(tmp_path / name, shared)) for name in ("one", "two"))
        yield one, two


def test_what_a_container_writes_is_its_own(pair: tuple[Container, Container], tmp_path: Path) -> None:
    """Neither its locks nor its half-written files go while it lives, whatever its process id; both go with it."""
    one, two = pair
    part = "part_path(Spool().root / 'pictures' / 'abc-0.jpg')"
    assert one.evaluate("LOCKS.acquire_lock('key', 'one')") == "True"
    assert one.evaluate("Spool().prepare()") == "None"
    assert one.evaluate(f"globals().update(file=open_part({part}))") == "None"
    assert one.evaluate("os.getpid()") == two.evaluate("os.getpid()") == "1"

    assert two.evaluate("LOCKS.acquire_lock('key', 'two', acquire_timeout=0)") == "False"
    assert two.evaluate("Spool().sweep()") == "None"
    assert len(list((tmp_path / "spool").rglob("*.part"))) == 1

    one.kill()
    assert two.evaluate("LOCKS.acquire_lock('key', 'two', acquire_timeout=5)") == "True"
    assert two.evaluate("Spool().sweep()") == "None"
    assert list((tmp_path / "spool").rglob("*.part")) == []


def test_two_containers_pay_once(pair: tuple[Container, Container], sandbox: RunningSandbox) -> None:
    """Of one request at the same time, one pays and the other finds the answer in the spool."""
    request = {"prompt": uuid4().hex, "seed": 1}
    for container in pair:
        assert container.evaluate("Spool().prepare()") == "None"
    sandbox.control.settings(latency=1)
    for container in pair:
        container.start(f"asyncio.run(pay({request}))")
    assert sorted(container.result() for container in pair) == ["False", "True"]
    assert sandbox.control.summary().billed_calls == 1
