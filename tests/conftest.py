"""What all tests share: a Prefect of their own, and real servers over sockets.

The environment is set before Prefect is imported, so that nothing of the developer's own Prefect, AWS or service
account is ever read or written.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

_HOME = Path(tempfile.mkdtemp(prefix="flux_prefect-tests-"))
_DATABASE = "FLUX_PREFECT_TEST_DATABASE"
_FOR_TESTS = {"FLUX_PREFECT_TEST_BROWSER", "FLUX_PREFECT_SCREENSHOTS", _DATABASE}
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "AWS_", "AIML", "FLUX_"))]:
    if _name not in _FOR_TESTS:
        del os.environ[_name]
os.environ.setdefault(_DATABASE, str(_HOME / "new.db"))  # processes that share the work share the first one's
os.environ |= {
    "HOME": str(_HOME),
    "PREFECT_HOME": str(_HOME / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_COLORS": "false",
    "FLUX_PREFECT_LOCKS": str(_HOME / "locks"),
    "FLUX_PREFECT_SPOOL": str(_HOME / "spool"),
    "FLUX_PREFECT_RETRY_DELAY_SECONDS": "[0]",
    "FLUX_PREFECT_URL_SETTLING_SECONDS": "0",
    "AWS_CONFIG_FILE": str(_HOME / "no-aws-config"),
    "AWS_SHARED_CREDENTIALS_FILE": str(_HOME / "no-aws-credentials"),
    "AWS_EC2_METADATA_DISABLED": "true",
}
# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Iterator  # noqa: E402 - the environment comes first
from uuid import uuid4  # noqa: E402

import pytest  # noqa: E402
from benchmarks.prefect_server import copy_database  # noqa: E402
from prefect.settings import get_current_settings  # noqa: E402
from prefect.testing.utilities import prefect_test_harness  # noqa: E402
from pydantic import SecretStr  # noqa: E402
from support.leaks import API_KEY, S3_SECRET_KEY, database_file, database_files, find_leaks  # noqa: E402
from support.nursery import Nursery  # noqa: E402

from flux_prefect.api.models import ImageRequest  # noqa: E402
from flux_prefect.bucket.image_bucket import ImageBucket  # noqa: E402
from flux_prefect.credentials import AimlApiCredentials  # noqa: E402
from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox  # noqa: E402


@pytest.fixture(scope="session")
def home() -> Path:
    """The folder that the whole session writes to: Prefect's home, spool, locks, sandbox."""
    return _HOME


@pytest.fixture(scope="session", autouse=True)
def no_key_left_behind(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After all else has ended, no key is in any file that the session wrote: spools, results, logs, books, objects."""
    yield
    assert find_leaks([home, tmp_path_factory.getbasetemp()]) == []


@pytest.fixture(scope="session")
def running_sandbox(home: Path) -> Iterator[RunningSandbox]:
    """The image service's stand-in and a real S3 server, in processes of their own."""
    with start_sandbox(home / "sandbox", api_key=API_KEY, s3_secret_key=S3_SECRET_KEY, latency=0.0) as running:
        yield running


@pytest.fixture(autouse=True)
def own_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool of each test's own."""
    monkeypatch.setenv("FLUX_PREFECT_SPOOL", str(tmp_path / "spool"))


@pytest.fixture
def sandbox(running_sandbox: RunningSandbox, monkeypatch: pytest.MonkeyPatch) -> RunningSandbox:
    """The sandbox with a clean ledger and no faults, and the environment that points to it."""
    running_sandbox.control.reset()
    for name, value in running_sandbox.environment.items():
        monkeypatch.setenv(name, value)
    return running_sandbox


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A real Prefect server with a database of its own; its API's address."""
    with prefect_test_harness(server_startup_timeout=150):
        url = get_current_settings().api.url
        assert url is not None
        template = Path(os.environ[_DATABASE])
        if not template.exists():
            copy_database(database_file(), template)
        yield url
        assert find_leaks(database_files()) == []  # before its folder goes


@pytest.fixture(scope="session")
def nursery(prefect_server: str, running_sandbox: RunningSandbox) -> Iterator[Nursery]:
    """A warm process that forks flows, on the session's sandbox and Prefect."""
    with Nursery({**os.environ, **running_sandbox.environment, "PREFECT_API_URL": prefect_server}) as warm:
        yield warm


@pytest.fixture
def credentials(sandbox: RunningSandbox) -> AimlApiCredentials:
    """The sandbox's account."""
    return AimlApiCredentials(api_key=SecretStr(API_KEY), base_url=sandbox.url)


@pytest.fixture
def bucket(sandbox: RunningSandbox) -> ImageBucket:
    """A prefix of its own in the sandbox's bucket."""
    return ImageBucket(
        bucket_name="images",
        prefix=uuid4().hex,
        endpoint_url=sandbox.environment["AWS_ENDPOINT_URL_S3"],
        region_name="us-east-1",
        aws_access_key_id=sandbox.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=SecretStr(sandbox.environment["AWS_SECRET_ACCESS_KEY"]),
    )


@pytest.fixture
def request_(sandbox: RunningSandbox) -> ImageRequest:  # noqa: ARG001 - only ever sent there
    """A request that no other test has made."""
    return ImageRequest(prompt=f"a lighthouse at dusk {uuid4().hex}", seed=7, aspect_ratio="1:1")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the tests over the cores one by one, and those of a file together where they share what the file starts.

    The files that take minutes come first, so that no core waits for the last of them at the end.
    """
    minutes = ("flows", "browser", "tests")  # by folder
    items.sort(key=lambda item: minutes.index(item.path.parent.name) if item.path.parent.name in minutes else 3)
    sharing = {item.path for item in items if _shares_fixtures(item)}
    for item in items:
        if item.path in sharing:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


def _shares_fixtures(item: pytest.Item) -> bool:
    """Whether a fixture that the test uses is made once for its file or class."""
    assert isinstance(item, pytest.Function)
    found = item._fixtureinfo.name2fixturedefs.items()
    return any(not name.startswith("_") and fixtures[-1].scope in {"module", "class"} for name, fixtures in found)


def pytest_unconfigure() -> None:
    """Leave nothing in the system's temporary folder."""
    shutil.rmtree(_HOME, ignore_errors=True)
