"""The ranks that run on this node, and whether they still do."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.distributed.collectives import gather
from mrmae_ds.distributed.launch import Launch


@dataclass(frozen=True)
class Process:
    """A rank's process.

    Attributes:
        rank, host, pid: where it is.
        born: when it began, in the kernel's own units, which tells it from a later one of the same id.
        stacks: its file descriptor that its stacks are written to.
    """

    rank: int
    host: str
    pid: int
    born: str
    stacks: int


class LocalRanks:
    """The other ranks of this node. All ranks make it together.

    A process that cannot be seen from here (in a container of its own) is not watched.
    """

    def __init__(self, launch: Launch, stacks: int) -> None:
        pid = os.getpid()
        self.own = Process(launch.rank, socket.gethostname(), pid, _born(pid) or "", stacks)
        there = [one for one in gather(self.own) if one.host == self.own.host and one.rank != self.own.rank]
        self.others = [one for one in there if one.born and _born(one.pid) == one.born]

    def dead(self) -> tuple[int, int] | None:
        """Rank and process id of a rank of this node that has ended."""
        for other in self.others:
            if _born(other.pid) != other.born:
                return other.rank, other.pid
        return None


def _born(pid: int) -> str | None:
    """When a process began; None if it has ended or cannot be seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in brackets, may hold anything; the state and the times follow it (proc(5)).
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
