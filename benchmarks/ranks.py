"""A benchmark's script as several processes, of which rank 0 tells what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_RESULT = "RESULT "


class RanksError(RuntimeError):
    """No result came; the message is the end of rank 0's output, or that it took too long."""


def tell(result: dict[str, Any]) -> None:
    """Rank 0's result, to :func:`run_ranks`, which started it."""
    print(_RESULT + json.dumps(result), flush=True)


def run_ranks(arguments: list[str], processes: int, accelerator: str, limit_s: float, **variables: str) -> Any:
    """Run a script as so many processes of this machine; end all of them when rank 0 has ended.

    Args:
        arguments: the script and its arguments.
        accelerator: ``cpu`` or ``cuda``.
        limit_s: seconds for all of it.
        variables: more of their environment.

    Returns:
        What rank 0 gave :func:`tell`.

    Raises:
        RanksError: without a result.
    """
    from tests.support.processes import environment, free_port

    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": accelerator}
    together |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)} | variables
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **together),
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        output = started[0].communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:
        raise RanksError(f"took more than {limit_s:.0f} s") from None
    finally:
        for process in started:
            process.kill()
            process.wait()
    found = [line for line in output.splitlines() if line.startswith(_RESULT)]
    if not found:
        raise RanksError(output.strip()[-4000:] or "rank 0 ended without a word")
    return json.loads(found[-1].removeprefix(_RESULT))


def machine(wanted: int | None) -> tuple[str, int]:
    """The accelerator of this machine, and processes: ``wanted``, or one a GPU, or two on the CPU."""
    import torch

    gpus = torch.cuda.device_count()
    return "cuda" if gpus else "cpu", wanted or gpus or 2
