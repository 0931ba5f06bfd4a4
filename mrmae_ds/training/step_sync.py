"""What all processes agree on before every optimizer step, in one reduction and one look at its result.

DeepSpeed waits for the device at this very place anyway, to look at the gradient norm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.distributed.signals import StopSignals
from mrmae_ds.training.engine.nonfinite import any_nonfinite, local_gradients


@dataclass(frozen=True)
class StepStatus:
    """What was agreed.

    Attributes:
        bad_loss, bad_gradient: not finite, on any rank.
        signal: that a rank received, 0 for none; the highest number counts.
        save: it is time for a checkpoint, by the clock.
        writing: a rank still writes one in the background.
    """

    bad_loss: bool = False
    bad_gradient: bool = False
    signal: int = 0
    save: bool = False
    writing: bool = False

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return not (self.bad_loss or self.bad_gradient)


@dataclass
class MicroBatch:
    """A micro-batch of the open step: rows of its samples, int64 [B], and its losses, all where they were made."""

    indices: Tensor
    losses: dict[str, Tensor]


@dataclass
class StepSync:
    """Collects what happens in a step, and agrees on it.

    Args:
        signals: of this process; None watches none.
        save_minutes: between two saves, by rank 0's clock; None does not save by the clock.
        writing: whether this rank writes a checkpoint in the background.
    """

    signals: StopSignals | None = None
    save_minutes: float | None = None
    writing: Callable[[], bool] = bool
    micros: list[MicroBatch] = field(default_factory=list)
    last_save: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """A step begins."""
        self.micros = []

    def add(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """A micro-batch is done; nothing is waited for."""
        self.micros.append(MicroBatch(batch.indices, {name: value.detach() for name, value in losses.items()}))

    def bad_loss(self) -> Tensor:
        """1.0 if a loss of this rank's step is not finite, float32 scalar on the device."""
        total = torch.stack([micro.losses["loss"].float() for micro in self.micros])
        return (~torch.isfinite(total).all()).float()

    def agree(self, engine: deepspeed.DeepSpeedEngine) -> StepStatus:
        """Between a step's last backward and its update. All ranks must call it."""
        bad_loss = self.bad_loss()
        device = bad_loss.device
        received = self.signals.received if self.signals else 0
        host = torch.tensor([received, self._time_is_up(), self.writing()], dtype=torch.float32)
        flags = torch.cat([torch.stack([bad_loss, any_nonfinite(local_gradients(engine), device)]), host.to(device)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        loss, gradient, signal, save, writing = flags.tolist()
        return StepStatus(bool(loss), bool(gradient), int(signal), bool(save), bool(writing))

    def saved(self) -> None:
        """A checkpoint was written; the clock starts again."""
        self.last_save = time.monotonic()

    def _time_is_up(self) -> bool:
        if self.save_minutes is None or dist.get_rank():
            return False
        return time.monotonic() - self.last_save >= 60 * self.save_minutes
