"""Periodic evaluation at the end of epochs."""

from __future__ import annotations

from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.evaluation.base import Evaluator


class EvaluationCallback(Callback):
    """Runs a stage's evaluation when it is due and keeps its results.

    Args:
        evaluator: the task's evaluation.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def on_epoch_end(self, context: TrainContext, epoch: int) -> dict[str, float]:
        """Evaluate if it is due."""
        if not self.evaluator.due(epoch):
            return {}
        context.heartbeat(f"evaluating after epoch {epoch}")
        results = self.evaluator.run(context.engine)
        context.results |= results
        return {name: results[key] for key, name in self.evaluator.metrics.items()}
