"""History of the CUDA allocator over a window of steps, written as a snapshot."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mrmae_ds.config.sections import MemorySnapshotConfig
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.step_sync import StepStatus

logger = logging.getLogger(__name__)


class MemorySnapshotCallback(Callback):
    """Records allocations of this rank's GPU; open the snapshot in https://pytorch.org/memory_viz.

    If training fails inside the window (out of memory), the snapshot is written with the allocations so far.

    Args:
        config: the recipe's ``memory_snapshot`` section.
        path: snapshot to write.
        device: device of this rank; on a CPU nothing is recorded.
    """

    def __init__(self, config: MemorySnapshotConfig, path: Path, device: torch.device) -> None:
        self.config, self.path = config, path
        self.enabled, self._recording = device.type == "cuda", False
        if not self.enabled:
            logger.warning("memory_snapshot: needs a CUDA device, not %s; nothing is recorded", device.type)

    def on_train_start(self, context: TrainContext) -> None:
        """Start recording if the window opens here."""
        self._start_if_due(context.state.step)

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        """Start or stop recording at the ends of the window."""
        if context.state.step == self.config.start_step + self.config.num_steps:
            self.close()
        self._start_if_due(context.state.step)

    def close(self) -> None:
        """Stop recording and write the snapshot of the steps so far."""
        if self._recording:
            self._recording = False
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self.path))
            torch.cuda.memory._record_memory_history(enabled=None)
            logger.info("memory snapshot: %s", self.path)

    def _start_if_due(self, step: int) -> None:
        if self.enabled and step == self.config.start_step:
            torch.cuda.memory._record_memory_history(max_entries=self.config.max_entries)
            self._recording = True
