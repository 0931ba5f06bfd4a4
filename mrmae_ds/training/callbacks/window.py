"""Base classes of callbacks that act on a window of steps, and of those that record it into a file."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path

from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.step_sync import StepStatus

logger = logging.getLogger(__name__)


class WindowCallback(Callback, ABC):
    """Records from one step on, for a number of steps, or until training fails.

    A run that resumes after the start of the window records nothing.

    Args:
        start_step: steps completed when the window opens.
        num_steps: steps in the window.
    """

    enabled = True  # False records nothing
    content: str  # of the window, for the log

    def __init__(self, start_step: int, num_steps: int) -> None:
        self.start_step, self.num_steps = start_step, num_steps
        self.recording = False

    @abstractmethod
    def start(self) -> None:
        """Start recording."""

    @abstractmethod
    def stop(self) -> None:
        """Stop recording."""

    def on_train_start(self, context: TrainContext) -> None:
        """Start recording if the window opens here; warn if it never will."""
        step, total = context.state.step, context.schedule.total_steps
        self._start_if_due(step)
        if self.enabled and not step <= self.start_step < total and not self._is_recorded():
            where = f"this run resumes at step {step}" if step > self.start_step else f"the stage ends at step {total}"
            logger.warning(f"{self.content}: starts at step {self.start_step}, but {where}; nothing is recorded")

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        """Start or stop recording at the ends of the window."""
        step = context.state.step
        if step == self.start_step + self.num_steps:
            self.close()
        self._start_if_due(step)

    def close(self) -> None:
        """Stop recording if training ends inside the window."""
        if self.recording:
            self.recording = False
            self.stop()

    def _is_recorded(self) -> bool:
        """Return True if the start before has recorded the window."""
        return False

    def _start_if_due(self, step: int) -> None:
        if self.enabled and step == self.start_step:
            self.recording = True
            self.start()


class FileWindowCallback(WindowCallback):
    """Writes its window to a file. What a failure cuts short is written up to there.

    A run that resumes after the start of the window keeps the file of the start before.

    Args:
        start_step: steps completed when the window opens.
        num_steps: steps in the window.
        path: file to write.
    """

    def __init__(self, start_step: int, num_steps: int, path: Path) -> None:
        super().__init__(start_step, num_steps)
        self.path = path

    def _is_recorded(self) -> bool:
        return self.path.exists()

    @abstractmethod
    def write(self) -> None:
        """Stop recording and write the file, whose folder exists."""

    def stop(self) -> None:
        """Stop recording and write the steps so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write()
        logger.info("%s: %s", self.content, self.path)
