"""History of the CUDA allocator over a window of steps, written as a snapshot."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mrmae_ds.config.sections import MemorySnapshotConfig
from mrmae_ds.training.callbacks.window import FileWindowCallback

logger = logging.getLogger(__name__)


class MemorySnapshotCallback(FileWindowCallback):
    """Records allocations of this rank's GPU; open the snapshot in https://pytorch.org/memory_viz.

    If training fails inside the window (out of memory), the snapshot is written with the allocations so far.

    Args:
        config: the recipe's ``memory_snapshot`` section.
        path: snapshot to write.
        device: device of this rank; on a CPU nothing is recorded.
    """

    content = "memory snapshot"

    def __init__(self, config: MemorySnapshotConfig, path: Path, device: torch.device) -> None:
        super().__init__(config.start_step, config.num_steps, path)
        self.max_entries, self.enabled = config.max_entries, device.type == "cuda"
        if not self.enabled:
            logger.warning("memory_snapshot: needs a CUDA device, not %s; nothing is recorded", device.type)

    def start(self) -> None:
        """Start recording."""
        torch.cuda.memory._record_memory_history(max_entries=self.max_entries)

    def write(self) -> None:
        """Write the snapshot and stop recording."""
        torch.cuda.memory._dump_snapshot(str(self.path))
        torch.cuda.memory._record_memory_history(enabled=None)
