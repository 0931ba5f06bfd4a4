"""Writing down where every process of a node is, when one gets no further.

Python's ``faulthandler`` does it in C, in a signal handler: so even a process in which one thread never lets go of the
interpreter can be asked by another process. The stacks go into memory that the others read through /proc, so that
nothing is left behind and no file system is needed, which may be what hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.local_ranks import LocalRanks, Process

DUMP_SIGNAL = signal.SIGUSR2
WRITE_S = 1.0  # for a process to write its stacks
LAST_RESORT_S = 60.0  # after the limit: a process alone, whose interpreter is held, is ended by faulthandler itself
REARM_S = 5.0


class StackDump:
    """This process's stacks, on demand by a signal; and the node's together. All ranks make it together.

    Args:
        launch: this process.
        limit_s: after which a process counts as stuck.
    """

    def __init__(self, launch: Launch, limit_s: float) -> None:
        self.limit_s, self._armed = limit_s, 0.0
        self._file = os.memfd_create("stacks")
        self.neighbors = LocalRanks(launch, self._file)
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)

    def postpone(self, now: float) -> None:
        """The process gets on: put off its end by faulthandler. Cheap enough for every step."""
        if now - self._armed > min(REARM_S, self.limit_s / 2):
            self._armed = now
            faulthandler.dump_traceback_later(self.limit_s + LAST_RESORT_S, exit=True)

    def dump(self) -> None:
        """Let every process of the node write its stacks; one of them prints them all to stderr."""
        processes = sorted([self.neighbors.own, *self.neighbors.others], key=lambda process: process.rank)
        for process in processes:
            with contextlib.suppress(OSError):
                if _stacks(process).stat().st_size == 0:
                    os.kill(process.pid, DUMP_SIGNAL)
        time.sleep(WRITE_S)
        with contextlib.suppress(OSError), _stacks(processes[0]).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another one is printing, or has printed
            self._print(processes)
            time.sleep(WRITE_S)

    def _print(self, processes: list[Process]) -> None:
        for process in processes:
            print(f"---- rank {process.rank}, process {process.pid} on {process.host}", file=sys.stderr)
            with contextlib.suppress(OSError):
                print(_stacks(process).read_text(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(DUMP_SIGNAL)
        os.close(self._file)


def _stacks(process: Process) -> Path:
    return Path(f"/proc/{process.pid}/fd/{process.stacks}")
