"""Run train.py in several processes with a hard time limit; every process is ended by its id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """Exit status and output of a process."""

    status: int
    stdout: str
    stderr: str


_RESERVED: deque[socket.socket] = deque(maxlen=100)  # the latest ports: no test starts this many groups at once


def free_port() -> int:
    """Return a free TCP port, which the system assigns to nobody else while this process lives.

    A rank binds it seconds later. Until then a socket that does not listen holds it: such a port is still free for a
    process that names it and reuses addresses, as torch's store does.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _RESERVED.append(holder)
    return holder.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment for a run on the CPU, without a launcher's variables."""
    ignored = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in ignored and not k.startswith("SLURM_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path} | extra


def run(
    command: Sequence[str | Path], limit_s: float, env: dict[str, str] | None = None, cwd: Path = REPOSITORY
) -> Finished:
    """Run a command in the repository, or in ``cwd``; the whole process group is killed if it takes longer.

    Raises TimeoutError then, with what was written so far.
    """
    process = _start(command, env or environment(), cwd)
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        kill(process)
        stdout, stderr = process.communicate()
        raise TimeoutError(f"{command} took more than {limit_s} s\n{stdout}\n{stderr}") from None
    return Finished(process.returncode, stdout, stderr)


def deepspeed_train(*arguments: str | Path, limit_s: float = 240) -> Finished:
    """``deepspeed --num_gpus 2 train.py ...``, the command of the README, on two CPU processes."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "train.py", *arguments]
    return run(command, limit_s)


TORCHRUN = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}
SRUN = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "world_size": "SLURM_NTASKS"}


def rank_processes(
    world_size: int,
    *arguments: str | Path,
    names: dict[str, str] = TORCHRUN,
    program: Sequence[str] = ("train.py",),
    cwd: Path = REPOSITORY,
) -> list[subprocess.Popen[str]]:
    """train.py as ``world_size`` processes, with the variables of torchrun or srun; the caller ends them.

    ``program`` is what Python runs, in the repository or in ``cwd``.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(world_size):
        values = {"rank": rank, "local_rank": rank, "world_size": world_size}
        ranks = {names[key]: str(value) for key, value in values.items()}
        if names is SRUN:
            ranks["SLURM_STEP_ID"] = "0"
        processes.append(_start([sys.executable, *program, *arguments], environment(**address, **ranks), cwd))
    return processes


def finish(processes: Sequence[subprocess.Popen[str]], limit_s: float) -> list[Finished]:
    """Wait for all processes; kill all if one exceeds the limit."""
    deadline = time.monotonic() + limit_s
    try:
        outputs = [p.communicate(timeout=max(0.1, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            kill(process)
        raise TimeoutError(f"{[p.args for p in processes]} took more than {limit_s} s") from None
    return [
        Finished(process.returncode, stdout, stderr)
        for process, (stdout, stderr) in zip(processes, outputs, strict=True)
    ]


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children, by its process group's id."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(command: Sequence[str | Path], env: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
