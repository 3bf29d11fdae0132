"""Python in a container of its own, as far as processes and temporary files go: it shares nothing but named folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from support.missing import do_without

_UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_EVALUATE = """
import asyncio
import os
import sys
from pathlib import Path

from flux_prefect.api.models import ImageRequest
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.custody import Order, obtain
from flux_prefect.host.locks import HostLockManager
from flux_prefect.host.spool import Spool
from flux_prefect.local_files import open_part, part_path

LOCKS = HostLockManager()


async def pay(request):
    async with AimlApiCredentials.from_env().open_client() as client:
        _, paid = await obtain(ImageRequest.model_validate(request), client, Spool(), Order())
    return paid


for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


class Container:
    """A Python with a process id namespace and a temporary folder of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, expression: str) -> None:
        """Begin to evaluate an expression."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{expression}\n")
        self._process.stdin.flush()

    def result(self) -> str:
        """The repr of the value of the expression that was started."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def evaluate(self, expression: str) -> str:
        """The repr of an expression's value."""
        self.start(expression)
        return self.result()

    def kill(self) -> None:
        """Kill it with everything in it (SIGKILL)."""
        self._process.kill()
        self._process.wait()


@contextmanager
def open_container(folder: Path, environment: Mapping[str, str]) -> Iterator[Container]:
    """Run a container whose temporary folder and home are in `folder`, without any setting of this process."""
    try:
        subprocess.run([*_UNSHARE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        do_without(error)
    for name in ("tmp", "home"):
        (folder / name).mkdir(parents=True)
    own = {
        "HOME": str(folder / "home"),
        "PREFECT_HOME": str(folder / "home" / "prefect"),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        [*_UNSHARE, sys.executable, "-c", _EVALUATE],
        env={"PATH": os.environ["PATH"], **own, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        container = Container(process)
        try:
            yield container
        finally:
            container.kill()
