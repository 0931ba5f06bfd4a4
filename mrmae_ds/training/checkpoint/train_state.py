"""Where a stage stands between two optimizer steps: what a checkpoint holds beside the engine's own state.

A checkpoint is taken right after an optimizer step, before what follows it (a logged line, an evaluation). What follows
is done again after a resume, so it is neither lost nor done twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.training.checkpoint.rng_state import random_state, restore_random_state
from mrmae_ds.training.meter import Meter

_FILE = "rank_{:05d}.pt"


@dataclass
class TrainState:
    """Counters of a running stage.

    Attributes:
        step: optimizer steps done, skipped ones included.
        skipped: of these, the steps that changed no weights because a loss or gradient was not finite.
        bad_in_row: of these, how many were the last ones.
        grad_norm: of the last step, where DeepSpeed left it; None if it is not known.
        meter: of the open interval.
    """

    step: int = 0
    skipped: int = 0
    bad_in_row: int = 0
    grad_norm: float | Tensor | None = None
    meter: Meter = field(default_factory=Meter)

    def to_save(self, module: nn.Module, micro_batch: int, device: torch.device) -> dict[str, Any]:
        """This rank's part of a checkpoint, with all random states, and the buffers of ``module``.

        DeepSpeed keeps the buffers of rank 0 alone, but for ZeRO-3; a BatchNorm's statistics are each rank's own.
        """
        norm = self.grad_norm
        return {
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_row": self.bad_in_row,
            "grad_norm": None if norm is None else float(norm),
            "meter": self.meter.state() | {"micro_batch": micro_batch},
            "random": random_state(device),
            "buffers": dict(module.named_buffers()),
        }


def state_file(rank: int) -> str:
    """The name of a rank's part in a checkpoint."""
    return _FILE.format(rank)


def load_state(
    checkpoint: Path, saved_by: int, module: nn.Module, launch: Launch, micro_batch: int, device: torch.device
) -> TrainState:
    """Read the counters, and put this rank's random states and buffers back.

    Args:
        checkpoint: the folder, verified.
        saved_by: number of ranks that wrote it. A rank beyond them takes rank 0's random states and buffers.
        module: whose buffers they are.
        launch, micro_batch: of this job.
        device: of this process.
    """
    names = [state_file(rank) for rank in range(saved_by)]
    states = [torch.load(checkpoint / name, map_location="cpu", weights_only=True) for name in names]
    own = states[launch.rank if launch.rank < saved_by else 0]
    restore_random_state(own["random"], device)
    buffers = dict(module.named_buffers())
    if buffers.keys() != own["buffers"].keys():
        raise ValueError(f"{checkpoint}: buffers differ: {sorted(buffers.keys() ^ own['buffers'].keys())}")
    for name, buffer in buffers.items():
        buffer.copy_(own["buffers"][name])
    return TrainState(
        step=own["step"],
        skipped=own["skipped"],
        bad_in_row=own["bad_in_row"],
        grad_norm=own["grad_norm"],
        meter=Meter.restored([state["meter"] for state in states], launch, micro_batch, device),
    )
