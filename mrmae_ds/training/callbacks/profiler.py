"""torch.profiler over a window of steps, written as a Chrome trace."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mrmae_ds.config.sections import ProfilerConfig
from mrmae_ds.profiling.step_ranges import start_ranges, stop_ranges
from mrmae_ds.training.callbacks.base import TrainContext
from mrmae_ds.training.callbacks.window import FileWindowCallback
from mrmae_ds.training.step_sync import StepStatus


class ProfilerCallback(FileWindowCallback):
    """Profiles the recipe's window of steps on this rank; open the trace in https://ui.perfetto.dev.

    Args:
        config: the recipe's ``profiler`` section.
        path: Chrome trace to write.
    """

    content = "profiler trace"

    def __init__(self, config: ProfilerConfig, path: Path) -> None:
        super().__init__(config.start_step, config.num_steps, path)
        self._profiler: profile  # from the start of the window on

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        """Mark the step in the trace, and start or stop at the ends of the window."""
        if self.recording:
            self._profiler.step()
        super().on_step_end(context, status)

    def start(self) -> None:
        """Start profiling."""
        start_ranges()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def write(self) -> None:
        """Stop profiling and write the trace."""
        self._profiler.stop()
        stop_ranges()
        self._profiler.export_chrome_trace(str(self.path))
