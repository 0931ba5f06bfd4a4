"""Set-up of data-loading worker processes: single-threaded, ignoring stop signals, and ending with their parent.

A stop signal goes to all processes of a terminal or of a Slurm step. Training saves a checkpoint after the current
step, for which it still needs images, so the workers ignore the signal. They end with the process that started them,
whatever ended it.
"""

from __future__ import annotations

import ctypes
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from mrmae_ds.errors import UserError
from mrmae_ds.units import significant

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
SHARED_MEMORY = Path("/dev/shm")
_SEMAPHORES = 1 << 16  # bytes of a worker's queues: each semaphore takes a page
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


def fork_server(module: str) -> ForkServerContext:
    """Return the context of a fork server that stop signals do not reach, running, with a module imported.

    It is a process of its own, which a signal to the whole step would end, and its workers with it. It imports what a
    program of ``python -m`` imports, too, as each worker would otherwise; for scripts Python cannot before 3.13.8.
    """
    context = multiprocessing.get_context("forkserver")
    program = getattr(sys.modules["__main__"], "__spec__", None)
    named = [program.name] if program is not None and not program.name.endswith("__main__") else []
    context.set_forkserver_preload([*named, module])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for start in (resource_tracker.ensure_running, forkserver.ensure_running):
            # A new process inherits the mask. Python unblocks some of these signals after it has started the first.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _end_workers() -> None:
    """Kill this process's workers at its exit: `multiprocessing` ends them by SIGTERM, and waits for them for good."""
    for process in multiprocessing.active_children():
        if isinstance(process, ForkServerProcess) and process.daemon:
            process.kill()


# Runs before that, also where a program ends in the middle of an epoch.
multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def ranks_of_launcher() -> int:
    """Return the number of ranks that a launcher started on this node, or inside this task of Slurm."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def check_shared_memory(user: str, batches: int, processes: int) -> None:
    """Check that /dev/shm holds the images and semaphores of every rank of this node.

    A process that finds it full fails or dies of SIGBUS, and the training waits for what it should have delivered.

    Args:
        user: of the memory, for the message.
        batches: bytes of this rank's images.
        processes: workers of this rank.

    Raises:
        UserError: naming the bytes that are needed and present, and the fix.
    """
    if not SHARED_MEMORY.is_dir():
        return
    needed = batches + (processes + 1) * _SEMAPHORES
    present, ranks = shutil.disk_usage(SHARED_MEMORY), ranks_of_launcher()
    # Free memory counts for this rank alone: the other ranks may or may not have theirs already.
    if present.total < ranks * needed or present.free < needed:
        raise UserError(
            f"{SHARED_MEMORY}: {user} needs {_mib(needed)} for each of {ranks} ranks on this node, but it has "
            f"{_mib(present.total)}, {_mib(present.free)} of them free. Enlarge it (docker run --shm-size=8g, or "
            f"mount -o remount,size=8G {SHARED_MEMORY}), remove leftover files there, or lower loader.num_workers or "
            "the micro-batch"
        )


def _mib(count: int) -> str:
    return f"{significant(count / (1 << 20))} MiB"


def worker_died(error: BaseException) -> UserError:
    """Return the error of a training whose worker process ended.

    Args:
        error: raised instead of its images.
    """
    where = ""
    if SHARED_MEMORY.is_dir():
        where = f", or {SHARED_MEMORY} is full ({_mib(shutil.disk_usage(SHARED_MEMORY).free)} free)"
    return UserError(f"a process that prepares images ended: out of memory{where}: {str(error).partition(chr(10))[0]}")
