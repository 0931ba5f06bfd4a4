"""Rank, local rank and world size from deepspeed, torchrun or srun; required environment variables.

Imports neither torch nor DeepSpeed, because they read some of these variables when they are imported.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from mrmae_ds.distributed.processes import WatchedProcess, find_launcher
from mrmae_ds.errors import UserError


@dataclass(frozen=True)
class Launch:
    """Position of this process in the job.

    Attributes:
        rank: of this process, 0 to world_size - 1.
        local_rank: rank on this node.
        world_size: number of ranks.
        local_size: number of ranks on this node.
        launcher: processes of the launcher, without which the ranks must not continue.
    """

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    launcher: tuple[WatchedProcess, ...] = field(default=(), compare=False)


def prepare_environment() -> Launch:
    """Read rank and world size, export them as torch expects, and set defaults that must precede the imports.

    Understands the deepspeed launcher and torchrun (RANK, LOCAL_RANK, WORLD_SIZE), srun (SLURM_PROCID,
    SLURM_LOCALID, SLURM_NTASKS) and plain ``python`` (one rank).

    Raises:
        UserError: if the launcher's variables are incomplete or not numbers, if Slurm's are those of a batch script
            without srun, or if the port of rank 0 is taken.
    """
    env = os.environ
    launched = "RANK" in env
    if not launched and "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS", 1) > 1:
        _export_slurm(env)
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    given = [name for name in defaults if name in env]
    if given and len(given) < len(defaults):
        missing = ", ".join(name for name in defaults if name not in env)
        raise UserError(
            f"environment: {', '.join(given)} set but not {missing}; start with deepspeed, torchrun or srun"
        )
    for name, value in defaults.items():
        env.setdefault(name, value)
    if env["WORLD_SIZE"] == "1":
        # A single process needs a rendezvous too; port 0 lets the system choose a free one.
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "0")
    launch = Launch(
        _number(env, "RANK", 0),
        _number(env, "LOCAL_RANK", 0),
        _number(env, "WORLD_SIZE", 1),
        _local_size(env),
    )
    if not 0 <= launch.rank < launch.world_size or launch.local_rank < 0:
        raise UserError(
            f"environment: RANK {launch.rank}, LOCAL_RANK {launch.local_rank} and WORLD_SIZE {launch.world_size} "
            "contradict each other"
        )
    if launched:
        launch = replace(launch, launcher=find_launcher())
    _check_port(env, launch)
    _set_defaults(env, launch)
    return launch


def _check_port(env: os._Environ[str], launch: Launch) -> None:
    """Check that rank 0 can listen, before the others connect to whatever does. Torchrun listens for its ranks."""
    if launch.rank or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = _number(env, "MASTER_PORT", 0)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OverflowError:
            raise UserError(f"environment: MASTER_PORT must be below 65536, got {port}") from None
        except OSError as error:  # any other is the process group's to report
            if error.errno == errno.EADDRINUSE:
                raise UserError(port_taken(port)) from None


def port_taken(port: int | str) -> str:
    """Return the message for a port on which another process listens."""
    return (
        f"port {port} is taken on this machine, probably by another job; choose another one: deepspeed --master_port "
        "N, torchrun --master_port N, or export MASTER_PORT=N under srun"
    )


def _number(env: os._Environ[str], name: str, default: int) -> int:
    try:
        return int(env.get(name, default))
    except ValueError:
        raise UserError(f"environment: {name} must be a whole number, got {env[name]!r}") from None


def _local_size(env: os._Environ[str]) -> int:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if env.get(name):
            return min(_number(env, name, 1), _number(env, "WORLD_SIZE", 1))
    return _number(env, "WORLD_SIZE", 1)


def _export_slurm(env: os._Environ[str]) -> None:
    if "SLURM_STEP_ID" not in env:
        raise UserError(
            f"environment: this Slurm job has {env['SLURM_NTASKS']} tasks, but srun did not start this process (there "
            "is no SLURM_STEP_ID), so the other ranks would never come: put srun in front of the command, or sbatch "
            "slurm/train.sbatch DS_CONFIG ...; for a single rank, SLURM_NTASKS=1 in front of it"
        )
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    tasks, node = _tasks_per_node(env), _number(env, "SLURM_NODEID", 0)
    if 0 <= node < len(tasks):
        env["LOCAL_SIZE"] = str(tasks[node])
    if len(tasks) == 1:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_ADDR" not in env:
        raise UserError(
            "environment: under srun, MASTER_ADDR must name the first node; slurm/train.sbatch finds it, or by hand: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)'
        )
    # Below the ports that the system assigns (from 32768). A requeued job uses another one, because a process of the
    # start before may still hold the last one.
    job, restart = _number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_RESTART_COUNT", 0)
    env.setdefault("MASTER_PORT", str(10000 + (job + 1009 * restart) % 20000))


def _tasks_per_node(env: os._Environ[str]) -> list[int]:
    """Return the tasks on each node of the step, in the nodes' order, from Slurm's short form: 4(x2),3 is 4, 4, 3."""
    counts: list[int] = []
    for part in filter(None, env.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"environment: SLURM_STEP_TASKS_PER_NODE: {part!r} is not a number of tasks")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _set_defaults(env: os._Environ[str], launch: Launch) -> None:
    # In the virtual environment: the shared default folder mixes builds of different DeepSpeed versions.
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    # DeepSpeed builds its CPU op with ninja, which lies beside this interpreter even if .venv is not activated.
    bin_dir = str(Path(sys.executable).parent)
    if bin_dir not in env.get("PATH", "").split(os.pathsep):
        env["PATH"] = bin_dir + os.pathsep + env.get("PATH", "")
    env.setdefault("NUMBA_THREADING_LAYER", "tbb")
    env.setdefault("LOCAL_SIZE", str(launch.local_size))
    if launch.local_size > 1:
        env.setdefault("OMP_NUM_THREADS", "1")
