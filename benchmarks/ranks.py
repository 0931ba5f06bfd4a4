"""Run a benchmark's script on several ranks; rank 0 reports the result."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_RESULT = "RESULT "


class RanksError(RuntimeError):
    """Raised without a result; the message is the end of rank 0's output, or the time limit."""


def report_result(result: dict[str, Any]) -> None:
    """Pass rank 0's result to :func:`run_ranks`, which started it."""
    print(_RESULT + json.dumps(result), flush=True)


def run_ranks(arguments: list[str], processes: int, accelerator: str, limit_s: float, **variables: str) -> Any:
    """Run a script on several ranks of this machine; all are killed when rank 0 has ended.

    Args:
        arguments: the script and its arguments.
        processes: number of ranks.
        accelerator: ``cpu`` or ``cuda``.
        limit_s: time limit in seconds.
        variables: additional environment variables.

    Returns:
        The result that rank 0 passed to :func:`report_result`.

    Raises:
        RanksError: without a result.
    """
    from tests.support.processes import environment, free_port

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": accelerator}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)} | variables
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
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
    results = [line for line in output.splitlines() if line.startswith(_RESULT)]
    if not results:
        raise RanksError(output.strip()[-4000:] or "rank 0 ended without output")
    return json.loads(results[-1].removeprefix(_RESULT))


def machine(requested: int | None) -> tuple[str, int]:
    """Return the accelerator and the number of ranks: ``requested``, else one per GPU or two on the CPU."""
    import torch

    gpus = torch.cuda.device_count()
    return "cuda" if gpus else "cpu", requested or gpus or 2
