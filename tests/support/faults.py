"""Faults to put into a process of train.py, by name: what could happen on one rank, at one step.

A fault is written ``NAME:key=value,...``; ``rank`` and ``step`` say where and when, ``micro`` which micro-batch (0).
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

Losses = dict[str, Tensor]


def install(fault: str) -> None:
    """Put a fault into this process, before it trains."""
    name, _, text = fault.partition(":")
    settings = dict(pair.split("=") for pair in text.split(",") if pair)
    rank, step, micro = (int(settings.pop(key, 0)) for key in ("rank", "step", "micro"))
    act: Callable[..., Losses] = globals()[f"_{name}"]
    if int(os.environ["RANK"]) != rank:
        return
    from mrmae_ds.training.tasks.build import TASKS

    for task in TASKS.values():
        _wrap(task, lambda losses, key: act(losses, **settings) if (key.step, key.index) == (step, micro) else losses)


def _wrap(task: Any, change: Callable[[Losses, Any], Losses]) -> None:
    plain = task.losses

    def losses(self: Any, engine: Any, batch: Any, key: Any) -> Losses:
        return change(plain(self, engine, batch, key), key)

    task.losses = losses


def _nan_loss(losses: Losses) -> Losses:
    """A loss that is not a number, and so are its gradients."""
    return {**losses, "loss": losses["loss"] * math.nan}


def _nan_shift(losses: Losses) -> Losses:
    """A loss that is not a number, with gradients that are fine: nothing but the loss itself tells."""
    return {**losses, "loss": losses["loss"] + math.nan}


def _nan_gradient(losses: Losses) -> Losses:
    """A fine loss whose gradient is not a number."""
    loss = losses["loss"] * 1.0
    loss.register_hook(lambda gradient: gradient * math.nan)
    return {**losses, "loss": loss}


def _error(losses: Losses) -> Losses:
    raise ValueError("the fault of this test")


def _sleep(losses: Losses) -> Losses:
    """Gets no further; other threads of the process do."""
    time.sleep(3600)
    return losses


def _freeze(losses: Losses) -> Losses:
    """Gets no further, and holds the interpreter: no other thread of the process runs any more."""
    ctypes.PyDLL(None).sleep(3600)
    return losses


def _signal(losses: Losses, number: str = "15") -> Losses:
    """Is told to stop, with all processes that it began, as by a terminal or by Slurm."""
    os.killpg(0, signal.Signals(int(number)))
    return losses


if __name__ == "__main__":  # python tests/support/faults.py FAULT -- ARGUMENTS OF train.py
    sys.path.insert(0, os.getcwd())
    from mrmae_ds.cli import train

    train.prepare_environment()
    install(sys.argv[1])
    status = train.main(sys.argv[3:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
