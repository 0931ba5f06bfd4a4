"""Distributed top-1/top-5 accuracy and loss; every validation image is counted exactly once.

Shape legend: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.data.loaders.base import Batch, Loader
from mrmae_ds.distributed.process_group import sum_over_ranks
from mrmae_ds.training.evaluation.base import EvalContext, Evaluator, Scores

TOP = 5
Logits = Callable[[nn.Module, Tensor], Tensor]


class AccuracyCounter:
    """Counts a model's correct predictions, on the device, until they are read."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.classes = 0

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Count a batch; samples that only pad it are not counted.

        Args:
            logits: float32 [B, classes].
            batch: the images' labels.
        """
        valid, self.classes = batch.valid, logits.shape[1]
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        first = logits.argmax(dim=1) == batch.labels
        among = (logits.topk(min(TOP, self.classes)).indices == batch.labels[:, None]).any(dim=1)
        counts = torch.stack([(first & valid).sum(), (among & valid).sum(), (losses * valid).sum(), valid.sum()])
        self.sums = self.sums.to(counts.device) + counts.double()

    def read(self, num_samples: int) -> Scores:
        """Reduce the counts over all ranks, which must all call it.

        Args:
            num_samples: images of the data set.

        Returns:
            ``top1`` and ``top5`` in percent, the mean ``loss``, and ``eval_samples``. ``top5`` is left out where there
            are at most five classes.

        Raises:
            RuntimeError: if the number of images counted is not ``num_samples``.
        """
        first, among, loss, count = sum_over_ranks(self.sums).tolist()
        if count != num_samples:
            raise RuntimeError(f"evaluated {count:.0f} images of {num_samples}")
        top5 = {"top5": 100 * among / count} if self.classes > TOP else {}
        return {"top1": 100 * first / count, **top5, "loss": loss / count, "eval_samples": int(count)}


@torch.no_grad()
def measure_accuracy(
    engine: nn.Module, logits: Logits, loader: Loader[Batch], heartbeat: Callable[[str], None] = lambda activity: None
) -> Scores:
    """Measure a model's accuracy over a data set, every image once. All ranks must call it.

    Args:
        engine: put into eval mode and left in it.
        logits: function of the engine and of uint8 images [B, 3, H, W] to float32 logits [B, classes].
        loader: an evaluation loader.
        heartbeat: called before every batch, with the current activity.

    Returns:
        The scores of :meth:`AccuracyCounter.read`.

    Raises:
        RuntimeError: if the number of images counted is not that of the data set.
    """
    engine.eval()
    counter = AccuracyCounter()
    for batch in loader.epoch(0):
        heartbeat("evaluating")
        counter.add(logits(engine, batch.images), batch)
    return counter.read(loader.num_samples)


class AccuracyEvaluator(Evaluator):
    """Accuracy of a classifier on the validation set while it trains.

    Args:
        context: recipe, ranks and device.
        logits: function of the engine and of uint8 images [B, 3, H, W] to float32 logits [B, classes].
        image_size: pixels, both sides.
        every_epochs: epochs between two measurements.
        last_epoch: number of epochs of the stage.
    """

    metrics: ClassVar = {"top1": "top1", "loss": "val_loss"}

    def __init__(
        self, context: EvalContext, logits: Logits, image_size: int, every_epochs: int, last_epoch: int
    ) -> None:
        super().__init__(every_epochs, last_epoch)
        self.logits, self.heartbeat = logits, context.heartbeat
        self.loader = context.loader(image_size)

    def run(self, engine: nn.Module) -> Scores:
        """Measure the accuracy on the validation set."""
        return measure_accuracy(engine, self.logits, self.loader, self.heartbeat)
