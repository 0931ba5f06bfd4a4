"""Set-up of data-loading worker processes: single-threaded, ignoring stop signals, and ending with their parent.

A stop signal goes to all processes of a terminal or of a Slurm step. Training saves a checkpoint after the current
step, for which it still needs images, so the workers ignore the signal. They end with the process that started them,
whatever ended it.
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
