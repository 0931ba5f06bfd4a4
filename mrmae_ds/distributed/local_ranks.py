"""The ranks of this node: whether they are alive, and where they are when the job hangs.

Python's ``faulthandler`` writes the stacks in C, in a signal handler, so even a rank with a thread that never releases
the interpreter can be dumped by another rank. The stacks go into memory that the other ranks read through /proc:
nothing is left behind, and no file system is needed, which may be what hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.distributed.collectives import gather
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.processes import start_time

DUMP_SIGNAL = signal.SIGUSR2
BEGIN_S = 10.0  # for all ranks to begin to write their stacks
WRITE_S = 1.0  # for a rank to write them
LAST_RESORT_S = 60.0  # after the timeout: faulthandler itself ends a rank whose interpreter is held
REARM_S = 5.0


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank.

    Attributes:
        rank: its rank.
        host: its node.
        pid: its process id.
        start_time: in the kernel's own units; distinguishes it from a later process of the same id.
        stacks: its file descriptor that its stacks are written to.
    """

    rank: int
    host: str
    pid: int
    start_time: str
    stacks: int


class LocalRanks:
    """The other ranks of this node. All ranks must construct it together.

    A rank that cannot be seen from here (in a container of its own) is not watched.

    Args:
        launch: this rank.
        timeout_s: without progress, after which a rank counts as hung.
    """

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        self.timeout_s, self._armed = timeout_s, 0.0
        self._file = os.memfd_create("stacks")
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)
        pid = os.getpid()
        self.own = RankProcess(launch.rank, socket.gethostname(), pid, start_time(pid) or "", self._file)
        local = [rank for rank in gather(self.own) if rank.host == self.own.host and rank.rank != self.own.rank]
        self.others = [rank for rank in local if rank.start_time and start_time(rank.pid) == rank.start_time]

    def dead(self) -> RankProcess | None:
        """Return a rank of this node that has ended; None if all are alive."""
        return next((rank for rank in self.others if start_time(rank.pid) != rank.start_time), None)

    def postpone_last_resort(self, now: float) -> None:
        """Reset faulthandler's timer, which ends this process. Cheap enough to call every step.

        Args:
            now: ``time.monotonic()``.
        """
        if now - self._armed > min(REARM_S, self.timeout_s / 2):
            self._armed = now
            faulthandler.dump_traceback_later(self.timeout_s + LAST_RESORT_S, exit=True)

    def dump_stacks(self) -> None:
        """Have every rank of the node write its stacks; one of them prints all to stderr."""
        ranks = sorted([self.own, *self.others], key=lambda rank: rank.rank)
        for rank in ranks:
            with contextlib.suppress(OSError):
                if _stacks(rank).stat().st_size == 0:
                    os.kill(rank.pid, DUMP_SIGNAL)
        deadline = time.monotonic() + BEGIN_S
        while not all(map(_has_begun, ranks)) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(WRITE_S)
        with contextlib.suppress(OSError), _stacks(ranks[0]).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another rank prints, or has printed
            for rank in ranks:
                print(f"---- rank {rank.rank}, process {rank.pid} on {rank.host}", file=sys.stderr)
                with contextlib.suppress(OSError):
                    print(_stacks(rank).read_text(), file=sys.stderr, flush=True)
            time.sleep(WRITE_S)

    def close(self) -> None:
        """Cancel the timer and release the memory."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(DUMP_SIGNAL)
        os.close(self._file)


def _has_begun(rank: RankProcess) -> bool:
    """Return True if a rank has written some of its stacks, or never will because it has ended."""
    try:
        return _stacks(rank).stat().st_size > 0
    except OSError:
        return True


def _stacks(rank: RankProcess) -> Path:
    return Path(f"/proc/{rank.pid}/fd/{rank.stacks}")
