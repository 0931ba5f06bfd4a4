"""Processes of this machine, as /proc shows them, and the launcher among them.

Imports neither torch nor DeepSpeed: the launcher is looked up before their slow imports, during which it may end.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# Launchers that do not end their ranks when they are killed. Slurm's steps end with slurmd's own means, and a parent
# that is a shell may leave by intention (nohup).
_LAUNCHERS = re.compile(r"deepspeed[./]launcher[./]launch\b|\btorchrun\b|\btorch[./]distributed[./](run|launch)\b")
_INNER_LAUNCHER = re.compile(r"deepspeed[./]launcher[./]launch\b")


@dataclass(frozen=True)
class WatchedProcess:
    """A process.

    Attributes:
        pid: its id.
        start: its start time, which distinguishes it from a later process of the same id.
    """

    pid: int
    start: str

    def ended(self) -> bool:
        """Return True if the process has ended."""
        return start_time(self.pid) != self.start


def find_launcher() -> tuple[WatchedProcess, ...]:
    """Return the processes of the launcher that started this process; none if its parent is no launcher.

    DeepSpeed's consists of two: ``deepspeed`` starts an inner launcher, which starts the ranks.
    """
    parent = os.getppid()
    command = _read(parent, "cmdline").replace("\0", " ")
    if not _LAUNCHERS.search(command):
        return ()
    pids = [parent]
    if _INNER_LAUNCHER.search(command) and (fields := _fields(parent)):
        pids.append(int(fields[1]))
    # Process 1 ends with its container, and 0 stands for a process of another one.
    return tuple(WatchedProcess(pid, start) for pid in pids if pid > 1 and (start := start_time(pid)))


def start_time(pid: int) -> str | None:
    """Return when a process started, in the kernel's own units; None if it has ended or cannot be seen."""
    fields = _fields(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def _fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on (proc(5)). The name before it may hold anything."""
    return _read(pid, "stat").rpartition(")")[2].split() or None


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
