"""torch.profiler over a window of steps, written as a Chrome trace."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mrmae_ds.config.sections import ProfilerConfig
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.step_sync import StepStatus

logger = logging.getLogger(__name__)


class ProfilerCallback(Callback):
    """Profiles the recipe's window of steps on this rank; open the trace in https://ui.perfetto.dev.

    Args:
        config: the recipe's ``profiler`` section.
        path: Chrome trace to write.
    """

    def __init__(self, config: ProfilerConfig, path: Path) -> None:
        self.config, self.path = config, path
        self._profiler: profile | None = None

    def on_train_start(self, context: TrainContext) -> None:
        """Start profiling if the window opens here."""
        self._start_if_due(context.state.step)

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        """Start or stop profiling at the ends of the window."""
        step = context.state.step
        if self._profiler is not None:
            self._profiler.step()
            if step == self.config.start_step + self.config.num_steps:
                self.close()
        self._start_if_due(step)

    def close(self) -> None:
        """Stop profiling and write the trace of the steps so far."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
            logger.info("profiler trace: %s", self.path)

    def _start_if_due(self, step: int) -> None:
        if step == self.config.start_step:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
