"""Set-up of data-loading worker processes: single-threaded, ignoring stop signals, and ending with their parent.

A stop signal goes to all processes of a terminal or of a Slurm step. Training saves a checkpoint after the current
step, for which it still needs images, so the workers ignore the signal. They end with the process that started them,
whatever ended it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from mrmae_ds.errors import UserError

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
SHARED_MEMORY = Path("/dev/shm")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def become_worker() -> None:
    """Set up this process; call it first in a worker."""
    torch.set_num_threads(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, int(signal.SIGKILL))
    if os.getppid() != parent:  # the parent has ended meanwhile
        os._exit(1)
    starter = multiprocessing.parent_process()
    if starter is not None and starter.pid != parent:
        # The parent is a fork server, which lives as long as its children.
        threading.Thread(target=_end_with, args=(starter,), daemon=True).start()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def ranks_of_launcher() -> int:
    """Return the number of ranks that a launcher started on this node, or inside this task of Slurm."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def check_shared_memory(needed: int) -> None:
    """Check that /dev/shm holds the buffers of every rank of this node; a process that finds it full dies of SIGBUS.

    Args:
        needed: bytes of this rank.

    Raises:
        UserError: naming the bytes that are needed and present, and the fix.
    """
    if not SHARED_MEMORY.is_dir():
        return
    present, ranks = shutil.disk_usage(SHARED_MEMORY), ranks_of_launcher()
    # Free memory counts for this rank alone: the other ranks may or may not have theirs already.
    if present.total < ranks * needed or present.free < needed:
        raise UserError(
            f"{SHARED_MEMORY}: RandAugment needs {_mib(needed)} for each of {ranks} ranks on this node, but it has "
            f"{_mib(present.total)}, {_mib(present.free)} of them free. Enlarge it (docker run --shm-size=8g, or "
            f"mount -o remount,size=8G {SHARED_MEMORY}), remove leftover files there, or lower the micro-batch"
        )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
