"""Run a command that must not outlive the process that started it. Run as a script, by path.

    python guard.py PARENT_PID COMMAND...

On Linux this process asks the kernel to kill the command when its parent dies, then becomes the command: a kill -9
of the parent is never missed. Elsewhere this process stays and checks twice a second whether the parent is still
there. The kernel's "parent" is the thread that started us: it must last.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY = 0.5


def main(parent: int, command: list[str]) -> int:
    """Run the command until it ends or the parent has died; returns its exit status."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            return 1
        os.execv(command[0], command)  # noqa: S606 - becomes the command
    return watch(parent, command)


def watch(parent: int, command: list[str]) -> int:
    """Without the kernel's help: check for the parent, pass SIGTERM on, kill the command once the parent is gone."""
    child = subprocess.Popen(command)  # noqa: S603 - the command is the caller's

    def pass_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    while child.poll() is None:
        if os.getppid() != parent:
            child.kill()
        time.sleep(_LOOK_EVERY)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
