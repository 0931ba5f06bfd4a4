"""One all-reduce of status flags before each optimizer step.

The flags are: non-finite loss or gradient, stop signal, save due, background save pending. The result comes to the host
while DeepSpeed waits for the gradient norm, so it costs no wait of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from mrmae_ds.data.loaders.base import to_device
from mrmae_ds.distributed.signals import StopSignals
from mrmae_ds.training.engine.nonfinite import (
    any_nonfinite,
    check_skipped,
    checks_norm,
    local_gradients,
    skip_step,
    spoil_norm,
)


@dataclass(frozen=True)
class StepStatus:
    """Status of a step, the same on every rank.

    Attributes:
        bad_loss: a loss is not finite on some rank.
        bad_gradient: a gradient is not finite on some rank.
        signal: highest number of a signal that a rank received; 0 for none.
        save: a checkpoint is due by rank 0's clock.
        writing: a rank is still writing a checkpoint in the background.
    """

    bad_loss: bool = False
    bad_gradient: bool = False
    signal: int = 0
    save: bool = False
    writing: bool = False

    @property
    def finite(self) -> bool:
        """True if the step may be applied."""
        return not (self.bad_loss or self.bad_gradient)


class Exchange:
    """Reduced flags of a step on their way to the host.

    Args:
        flags: float32 [5] on the device, the same on every rank: bad loss, bad gradient, signal, save, writing.

    Attributes:
        bad: True if a loss or gradient is not finite on some rank, bool scalar on the device.
    """

    def __init__(self, flags: Tensor) -> None:
        self.bad = flags[:2].any()
        self._flags = flags.to("cpu", non_blocking=True)  # pinned, if it comes from CUDA
        self._copied = torch.cuda.current_stream(flags.device).record_event() if flags.is_cuda else None

    def read(self) -> StepStatus:
        """Return the status; wait for it if the host has not waited for the device since."""
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()
        loss, gradient, signal, save, writing = self._flags.tolist()
        return StepStatus(bool(loss), bool(gradient), int(signal), bool(save), bool(writing))


def take_step(engine: deepspeed.DeepSpeedEngine, exchange: Exchange) -> StepStatus:
    """Take the optimizer step if it is finite on all ranks, else skip it. All ranks must call it.

    Args:
        engine: after the backward pass of the step's last micro-batch.
        exchange: of this step's status.

    Raises:
        RuntimeError: if DeepSpeed took a step that had to be skipped.
    """
    if checks_norm(engine):
        spoil_norm(engine, exchange.bad)
        engine.step()
        status = exchange.read()
        if not status.finite:
            check_skipped(engine)
    else:
        status = exchange.read()
        if status.finite:
            engine.step()
        else:
            skip_step(engine)
    if status.finite and not engine.was_step_applied():
        # DeepSpeed's own check: the square of a gradient may overflow where the gradient does not.
        return replace(status, bad_gradient=True)
    return status


@dataclass
class MicroBatch:
    """A micro-batch of the current step, on the device.

    Attributes:
        indices: the samples' rows in the data set, int64 [B].
        losses: scalars by name.
    """

    indices: Tensor
    losses: dict[str, Tensor]


@dataclass
class StepSync:
    """Collects the status of a step on this rank and exchanges it.

    Args:
        signals: signals received by this process; None watches none.
        save_minutes: minutes between two saves by rank 0's clock; None does not save by the clock.
        writing: returns True while this rank writes a checkpoint in the background.
    """

    signals: StopSignals | None = None
    save_minutes: float | None = None
    writing: Callable[[], bool] = bool
    micro_batches: list[MicroBatch] = field(default_factory=list)
    last_save: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """Start a step."""
        self.micro_batches = []

    def add(self, batch: Any, losses: dict[str, Tensor]) -> None:
        """Add a finished micro-batch, without waiting for the device."""
        detached = {name: value.detach() for name, value in losses.items()}
        self.micro_batches.append(MicroBatch(batch.indices, detached))

    def bad_loss(self) -> Tensor:
        """Return 1.0 if a loss of this rank's step is not finite, float32 scalar on the device."""
        total = torch.stack([micro_batch.losses["loss"].float() for micro_batch in self.micro_batches])
        return (~torch.isfinite(total).all()).float()

    def exchange(self, engine: deepspeed.DeepSpeedEngine) -> Exchange:
        """Reduce the status over all ranks, between a step's last backward and its update. All ranks must call it.

        Args:
            engine: holds the gradients.
        """
        bad_loss = self.bad_loss()
        device = bad_loss.device
        received = self.signals.received if self.signals else 0
        host = torch.tensor([received, self._save_is_due(), self.writing()], dtype=torch.float32)
        bad = torch.stack([bad_loss, any_nonfinite(local_gradients(engine), device)])
        flags = torch.cat([bad, to_device(host, device)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return Exchange(flags)

    def saved(self) -> None:
        """Restart the clock after a checkpoint."""
        self.last_save = time.monotonic()

    def _save_is_due(self) -> bool:
        if self.save_minutes is None or dist.get_rank():
            return False
        return time.monotonic() - self.last_save >= 60 * self.save_minutes
