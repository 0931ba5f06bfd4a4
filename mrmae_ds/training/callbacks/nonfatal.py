"""Protection of a training from the failures of its optional callbacks."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.step_sync import StepStatus

logger = logging.getLogger(__name__)


class NonfatalCallback(Callback):
    """Wrapper that warns about the first failure of a callback and then leaves it out; training continues.

    For observers such as a profiler or W&B, whose full disk or unreachable server is no reason to lose hours of
    training. Since a failure is this rank's alone, the wrapped callback must not use collectives.

    Args:
        name: section of the recipe, for the warning.
        callback: the observer.
    """

    def __init__(self, name: str, callback: Callback) -> None:
        self.name, self.callback = name, callback
        self.failed = False

    def on_train_start(self, context: TrainContext) -> None:
        """Pass on."""
        self._call(lambda: self.callback.on_train_start(context))

    def on_step_skipped(self, context: TrainContext, status: StepStatus) -> None:
        """Pass on."""
        self._call(lambda: self.callback.on_step_skipped(context, status))

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        """Pass on."""
        self._call(lambda: self.callback.on_step_end(context, status))

    def on_log(self, context: TrainContext, values: dict[str, float]) -> None:
        """Pass on."""
        self._call(lambda: self.callback.on_log(context, values))

    def on_train_end(self, context: TrainContext) -> None:
        """Pass on."""
        self._call(lambda: self.callback.on_train_end(context))

    def close(self) -> None:
        """Pass on."""
        self._call(self.callback.close)

    def _call(self, method: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            method()
        except Exception as error:  # of any library
            self.failed = True
            reason = " ".join(str(error).split())
            logger.warning(f"{self.name}: {type(error).__name__}: {reason}; it is off from here, training continues")
