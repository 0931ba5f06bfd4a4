"""Logging of metrics to the run folder and the terminal."""

from __future__ import annotations

from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.run_logger import RunLogger


class MetricsCallback(Callback):
    """Keeps the first and the last logged loss among the results; on rank 0, writes every logged interval.

    Args:
        run_logger: of rank 0; None on the other ranks.
    """

    def __init__(self, run_logger: RunLogger | None) -> None:
        self.run_logger = run_logger

    def on_log(self, context: TrainContext, values: dict[str, float]) -> None:
        """Keep the loss among the results and write the values."""
        context.results.setdefault("first_loss", values["loss"])
        context.results["last_loss"] = values["loss"]
        if self.run_logger:
            self.run_logger.log(context.state.step, values)
