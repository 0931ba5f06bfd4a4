"""Faults to inject into a rank of train.py, by name, at one step.

A fault is written ``NAME:key=value,...``; ``rank``, ``step`` and ``micro`` (micro-batch, 0) say where and when.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor

Losses = dict[str, Tensor]


def install(fault: str) -> None:
    """Inject a fault into this rank before it trains."""
    name, _, text = fault.partition(":")
    settings = dict(pair.split("=") for pair in text.split(",") if pair)
    rank, step, micro = (int(settings.pop(key, 0)) for key in ("rank", "step", "micro"))
    act: Callable[..., Losses] = globals()[f"_{name}"]
    if int(os.environ["RANK"]) != rank:
        return
    from mrmae_ds.config.stages import TrainStageName
    from mrmae_ds.training.tasks.build import task_class

    for stage in get_args(TrainStageName):
        _wrap(
            task_class(stage),
            lambda losses, key: act(losses, **settings) if (key.step, key.index) == (step, micro) else losses,
        )


def _wrap(task: Any, change: Callable[[Losses, Any], Losses]) -> None:
    plain = task.losses

    def losses(self: Any, engine: Any, batch: Any, key: Any) -> Losses:
        return change(plain(self, engine, batch, key), key)

    task.losses = losses


def _nan_loss(losses: Losses) -> Losses:
    """Make the loss NaN, and thereby its gradients."""
    return {**losses, "loss": losses["loss"] * math.nan}


def _nan_shift(losses: Losses) -> Losses:
    """Make the loss NaN while its gradients stay finite."""
    return {**losses, "loss": losses["loss"] + math.nan}


def _nan_gradient(losses: Losses) -> Losses:
    """Make the gradient NaN while the loss stays finite."""
    loss = losses["loss"] * 1.0
    loss.register_hook(lambda gradient: gradient * math.nan)
    return {**losses, "loss": loss}


def _error(losses: Losses) -> Losses:
    raise ValueError("the fault of this test")


def _sleep(losses: Losses) -> Losses:
    """Hang, while other threads of the process run."""
    time.sleep(3600)
    return losses


def _freeze(losses: Losses) -> Losses:
    """Hang while holding the interpreter, so that no other thread of the process runs."""
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):  # a deadlock that no signal interrupts
        libc.pthread_mutex_lock(mutex)
    return losses


def _signal(losses: Losses, number: str = "15") -> Losses:
    """Send a stop signal to this rank and its child processes, as a terminal or Slurm does."""
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
