"""What a process is that only prepares images: one thread, and no will of its own.

A signal to stop goes to all processes of a terminal or of a Slurm step. Training answers it by a checkpoint after the
step, for which it still needs its images; so the processes that prepare them pay no heed. They end when told, or with
the process that began them, whatever ended it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from multiprocessing.process import BaseProcess

import torch

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def become_worker() -> None:
    """To be called first in such a process."""
    torch.set_num_threads(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, int(signal.SIGKILL))
    if os.getppid() != parent:  # it ended in between
        os._exit(1)
    began = multiprocessing.parent_process()
    if began is not None and began.pid != parent:
        # A fork server is the parent, and lives as long as its children do.
        threading.Thread(target=_end_with, args=(began,), daemon=True).start()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)
