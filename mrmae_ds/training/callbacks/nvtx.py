"""NVTX ranges of the stages of a step over a window of steps, for Nsight Systems."""

from __future__ import annotations

import torch

from mrmae_ds.config.sections import NvtxConfig
from mrmae_ds.profiling.step_ranges import start_ranges, stop_ranges
from mrmae_ds.training.callbacks.window import WindowCallback


class NvtxCallback(WindowCallback):
    """Marks the stages of a step on this rank, and the window itself for ``nsys profile -c cudaProfilerApi``.

    Args:
        config: the recipe's ``nvtx`` section.
        device: device of this rank; on a CPU only torch.profiler sees the ranges.
    """

    content = "NVTX ranges"

    def __init__(self, config: NvtxConfig, device: torch.device) -> None:
        super().__init__(config.start_step, config.num_steps)
        self.on_cuda = device.type == "cuda"

    def start(self) -> None:
        """Open the window."""
        start_ranges()
        if self.on_cuda:
            torch.cuda.profiler.start()

    def stop(self) -> None:
        """Close the window."""
        stop_ranges()
        if self.on_cuda:
            torch.cuda.profiler.stop()
