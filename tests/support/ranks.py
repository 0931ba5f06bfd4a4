"""Ranks of train.py that start immediately: forked from a server that has imported everything.

They run train.py's ``main``, with the environment and the working directory that a launcher would set.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support.processes import REPOSITORY, environment, free_port

PRELOADED = [
    "train",
    "mrmae_ds.training.run",
    "mrmae_ds.data.loaders.pillow",
    "mrmae_ds.teachers.sources.checkpoint",
    "tests.support.faults",
]


@dataclass
class Ranks:
    """Ranks of one run.

    Attributes:
        processes: by rank.
        logs: files with stdout and stderr of each rank.
    """

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, limit_s: float = 200) -> list[int]:
        """Return exit statuses, negative for a signal; kill all ranks if they exceed the limit.

        In a new checkout the first ranks that read data compile the decoders, which takes a minute of both cores.
        """
        deadline = time.monotonic() + limit_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process.pid for process in self.processes if process.is_alive()]
        self.kill()
        if late:
            raise TimeoutError(f"still running after {limit_s} s: {late}\n{self.text()}")
        return [process.exitcode if process.exitcode is not None else 0 for process in self.processes]

    def kill(self) -> None:
        """Kill all ranks and their children."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has no group of its own yet
                    process.kill()
        for process in self.processes:
            process.join()

    def alive(self) -> bool:
        """Return True if all ranks run."""
        return all(process.is_alive() for process in self.processes)

    def text(self, rank: int | None = None) -> str:
        """Return the output of a rank, or of all."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text(errors="replace") for log in logs if log.exists())


@functools.cache
def fork_server() -> ForkServerContext:
    """Return the server that forks processes with everything imported; started at the first call."""
    context = multiprocessing.get_context("forkserver")
    # Otherwise a server that a loader of this process has started would be taken, which has less imported.
    forkserver._forkserver._forkserver_pid = None  # type: ignore[attr-defined]
    before = dict(os.environ)
    os.environ.update(environment())
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def start(
    world_size: int, arguments: Sequence[str | Path], folder: Path, fault: str = "", count: int | None = None
) -> Ranks:
    """Start train.py on ``world_size`` ranks.

    Args:
        arguments: of train.py.
        folder: for the logs.
        fault: see :mod:`tests.support.faults`.
        count: of the ranks that are started, the first ones; None is all.
    """
    server = fork_server()
    folder.mkdir(parents=True, exist_ok=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    processes, logs = [], []
    for rank in range(world_size if count is None else count):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world_size)}
        log = folder / f"rank{rank}.log"
        log.unlink(missing_ok=True)  # of an earlier run: this one may be killed before it writes
        argv = [str(argument) for argument in arguments]
        process = server.Process(target=_rank, args=(argv, address | ranks, log, fault))
        process.start()
        processes.append(process)
        logs.append(log)
    return Ranks(processes, logs)


def _rank(argv: list[str], values: dict[str, str], log: Path, fault: str) -> None:
    # The rank's loaders take the server that has forked the rank: a server of their own would import torch once more.
    forkserver._forkserver.ensure_running = forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore
    os.setsid()
    os.chdir(REPOSITORY)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):  # as a shell leaves them, even if nohup started the tests
        signal.signal(getattr(signal, name), signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler)
    os.environ.update(values)
    from mrmae_ds.cli import train
    from tests.support import faults

    if fault:
        faults.install(fault)
    status = train.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_in_group(work: Callable[..., None], world_size: int, *arguments: Any, limit_s: float = 180) -> None:
    """Call ``work(rank, world_size, *arguments)`` on every rank of a new gloo group; assert that all end well.

    Args:
        work: a function that can be pickled.
        world_size: number of ranks.
        arguments: passed to ``work``.
        limit_s: seconds after which all ranks are killed.
    """
    server, port = fork_server(), free_port()
    processes = [
        server.Process(target=_member, args=(work, rank, world_size, port, *arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit_s)
    late = [process.pid for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late and [process.exitcode for process in processes] == [0] * world_size


def _member(work: Callable[..., None], rank: int, world_size: int, port: int, *arguments: Any) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()}, MASTER_ADDR="127.0.0.1")
    os.chdir(REPOSITORY)
    import torch

    from mrmae_ds.distributed.launch import prepare_environment
    from mrmae_ds.distributed.process_group import end_process_group, start_process_group

    prepare_environment()
    torch.set_num_threads(1)
    start_process_group(torch.device("cpu"))
    work(rank, world_size, *arguments)
    end_process_group()
    os._exit(0)
