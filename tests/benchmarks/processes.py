"""What the kernel knows of a process: CPU time and memory, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time of all of its threads so far, to 10 ms."""
    return sum(_times(pid)[:2]) / _TICKS


def family_cpu_seconds(pid: int) -> float:
    """CPU time so far of a process and of those of its children that have ended."""
    return sum(_times(pid)) / _TICKS


def _times(pid: int) -> list[int]:
    # The name, in brackets, may hold anything; user and system time stand 12th and 13th behind it, the children's next.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return [int(field) for field in fields[11:15]]


def own_peak_memory() -> int:
    """The most resident memory that this process ever had, in bytes.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
