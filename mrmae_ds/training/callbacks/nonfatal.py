"""Protection of a training from the failures of its optional callbacks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

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
        limit_s: seconds after which a call counts as a failure, for an observer that may wait without end; its calls
            then run in threads of their own. None is no limit.
    """

    def __init__(self, name: str, callback: Callback, limit_s: float | None = None) -> None:
        self.name, self.callback, self.limit_s = name, callback, limit_s
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
            if self.limit_s is None:
                method()
            else:
                run_within(self.limit_s, method)
        except Exception as error:  # of any library
            self.failed = True
            reason = " ".join(str(error).split())
            logger.warning(f"{self.name}: {type(error).__name__}: {reason}; it is off from here, training continues")


def run_within(seconds: float, method: Callable[[], None], late: str = "") -> None:
    """Run a method in a thread, which does not outlive the process.

    Args:
        seconds: limit, after which it is left alone.
        method: what to run.
        late: message after the limit.

    Raises:
        TimeoutError: after the limit.
        Exception: what the method raises.
    """
    outcome: Future[None] = Future()

    def work() -> None:
        try:
            method()
        except BaseException as error:  # raised again where it is waited for
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome.done():
        raise TimeoutError(late or f"no answer within {seconds:g} s")
    outcome.result()
