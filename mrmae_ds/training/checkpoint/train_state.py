"""Training state saved beside DeepSpeed's: step counters, the open logging interval, random states and buffers.

A checkpoint is taken right after an optimizer step, before what follows it (a logged line, an evaluation). What follows
is done again after a resume, so it is neither lost nor done twice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrmae_ds.distributed.collectives import gather
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.training.meter import Meter

_FILE = "rank_{:05d}.pt"


@dataclass
class TrainState:
    """Counters of a running stage.

    Attributes:
        step: optimizer steps completed, skipped ones included.
        skipped: of these, the steps that changed no weights because a loss or gradient was not finite.
        bad_in_row: number of skipped steps since the last step that was taken.
        grad_norm: of the last step, where DeepSpeed left it; None if it is not known.
        meter: of the open logging interval.
    """

    step: int = 0
    skipped: int = 0
    bad_in_row: int = 0
    grad_norm: float | Tensor | None = None
    meter: Meter = field(default_factory=Meter)

    def to_save(self, module: nn.Module, micro_batch: int, device: torch.device) -> dict[str, Any]:
        """Return this rank's state for a checkpoint: the counters, all random states, the buffers of ``module``.

        DeepSpeed keeps the buffers of rank 0 alone, except under ZeRO-3; a BatchNorm's statistics are each rank's own.
        """
        norm = self.grad_norm
        return {
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_row": self.bad_in_row,
            "grad_norm": None if norm is None else float(norm),
            "meter": self.meter.state() | {"micro_batch": micro_batch},
            "random": random_state(device),
            "buffers": persistent_buffers(module),
        }


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers by name, without those that follow from the model's sizes (indices of relative positions)."""
    left = {id(part._buffers[name]) for part in module.modules() for name in part._non_persistent_buffers_set}
    return {name: buffer for name, buffer in module.named_buffers() if id(buffer) not in left}


def state_file(rank: int) -> str:
    """Return the name of a rank's state in a checkpoint."""
    return _FILE.format(rank)


def load_state(
    checkpoint: Path, saved_by: int, module: nn.Module, launch: Launch, micro_batch: int, device: torch.device
) -> TrainState:
    """Restore this rank's counters, random states and buffers. All ranks must call it.

    Each rank reads its own file, or, on fewer ranks than wrote them, its share of the files. One collective operation
    shares what every rank needs of the others' (the sums of the open interval), so W ranks open W files, not W².

    Args:
        checkpoint: the verified folder.
        saved_by: number of ranks that wrote it. A rank beyond them takes rank 0's random states and buffers.
        module: whose buffers are restored.
        launch: this rank.
        micro_batch: images a rank takes at a time.
        device: of this rank.

    Raises:
        ValueError: if the module has other buffers.
    """
    source = launch.rank if launch.rank < saved_by else 0
    own = _read(checkpoint, source)
    meters = {source: own["meter"]}
    for rank in range(source + launch.world_size, saved_by, launch.world_size):
        meters[rank] = _read(checkpoint, rank)["meter"]
    meters = {rank: meter for some in gather(meters) for rank, meter in some.items()}
    restore_random_state(own["random"], device)
    buffers = persistent_buffers(module)
    if buffers.keys() != own["buffers"].keys():
        raise ValueError(f"{checkpoint}: buffers differ: {sorted(buffers.keys() ^ own['buffers'].keys())}")
    for name, buffer in buffers.items():
        buffer.copy_(own["buffers"][name])
    return TrainState(
        step=own["step"],
        skipped=own["skipped"],
        bad_in_row=own["bad_in_row"],
        grad_norm=own["grad_norm"],
        meter=Meter.restored([meters[rank] for rank in range(saved_by)], launch, micro_batch, device),
    )


def _read(checkpoint: Path, rank: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoint / state_file(rank), map_location="cpu", weights_only=True)
    return state


# ---- random generators
# Every step seeds what it draws from (mrmae_ds.training.tasks.base.MicroBatchKey), so a resumed run does not depend on
# these states; they are kept for whatever else draws.


def random_state(device: torch.device) -> dict[str, Any]:
    """Return Python's, numpy's, torch's and the device's states, in types that ``torch.load`` reads safely."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.array(keys)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device.type).get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore all generators; the device's only if the state was taken on a device of this kind."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device.type).set_rng_state(state["device"], device)
