"""k-NN evaluation of the encoder's features during pre-training; nothing is trained for it.

DINO's protocol: features of length 1; the k nearest training images vote for their class with weight
exp(cosine / temperature). Each image counts once, on any number of ranks.

Shape legend: B images of a batch, N of the training set (or of a part of it), C the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.config.stages import KnnConfig
from mrmae_ds.data.loaders.base import Batch, Loader
from mrmae_ds.distributed.process_group import sum_over_ranks
from mrmae_ds.training.evaluation.base import EvalContext, Evaluator, Scores

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bank:
    """Training images that vote, the same on every rank.

    Attributes:
        features: [N, C], of length 1.
        labels: int64 [N].
    """

    features: Tensor
    labels: Tensor


@torch.no_grad()
def gather_bank(features: Features, loader: Loader[Batch]) -> Bank:
    """Compute the features of a loader's images, each once, and gather them on every rank. All ranks must call it.

    Args:
        features: function of decoded images, uint8 [B, 3, H, W], to features [B, C].
        loader: an evaluation loader; every rank has equally many batches, and padding is marked as not valid.
    """
    parts = [(F.normalize(features(batch.images), dim=1), batch) for batch in loader.epoch(0)]
    own = torch.cat([part for part, _ in parts])
    labels = torch.cat([_masked_labels(batch) for _, batch in parts])
    if dist.get_world_size() > 1:
        own, labels = _gather(own), _gather(labels)
    valid = labels >= 0
    return Bank(own[valid], labels[valid])


def _masked_labels(batch: Batch) -> Tensor:
    """Return a batch's labels, -1 for padding."""
    return torch.where(batch.valid, batch.labels, -1)


def _gather(tensor: Tensor) -> Tensor:
    shares = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, tensor.contiguous())
    return torch.cat(shares)


def votes(queries: Tensor, bank: Bank, k: int, temperature: float, num_classes: int) -> Tensor:
    """Sum the weights of each class, [B, classes].

    Args:
        queries: features [B, C], of any length.
        bank: at least one image; with fewer than ``k``, all of them vote.
        k: number of neighbors.
        temperature: divisor of the cosine in a vote's weight.
        num_classes: number of classes.
    """
    cosines = F.normalize(queries, dim=1) @ bank.features.T
    near = cosines.topk(min(k, len(bank.labels)), dim=1)
    counts = torch.zeros(len(queries), num_classes, device=queries.device, dtype=queries.dtype)
    return counts.scatter_add_(1, bank.labels[near.indices], (near.values / temperature).exp())


@torch.no_grad()
def knn_accuracy(
    features: Features, train: Loader[Batch], val: Loader[Batch], config: KnnConfig, num_classes: int
) -> Scores:
    """Measure the k-NN accuracy over the validation set, each image once. All ranks must call it.

    Args:
        features: function of decoded images, uint8 [B, 3, H, W], to features [B, C].
        train: evaluation loader of the images that vote.
        val: evaluation loader of the validation set.
        config: the recipe's section.
        num_classes: number of classes.

    Returns:
        ``knn/top1`` in percent.

    Raises:
        RuntimeError: if the number of images counted is not that of the validation set.
    """
    bank = gather_bank(features, train)
    sums = torch.zeros(2, dtype=torch.float64, device=bank.features.device)
    for batch in val.epoch(0):
        predicted = votes(features(batch.images), bank, config.k, config.temperature, num_classes).argmax(dim=1)
        sums += torch.stack([((predicted == batch.labels) & batch.valid).sum(), batch.valid.sum()])
    right, count = sum_over_ranks(sums).tolist()
    if count != val.num_samples:
        raise RuntimeError(f"evaluated {count:.0f} images of {val.num_samples}")
    return {"knn/top1": 100 * right / count}


class KnnEvaluator(Evaluator):
    """k-NN accuracy of a pre-training's features while it trains.

    Args:
        context: recipe, ranks and device.
        features: function of the engine and of uint8 images [B, 3, H, W] to features [B, C].
        image_size: pixels, both sides.
        config: the recipe's section.
        last_epoch: number of epochs of the stage.
    """

    metrics: ClassVar = {"knn/top1": "knn/top1"}

    def __init__(
        self,
        context: EvalContext,
        features: Callable[[nn.Module, Tensor], Tensor],
        image_size: int,
        config: KnnConfig,
        last_epoch: int,
    ) -> None:
        super().__init__(config.every_epochs, last_epoch)
        self.config, self.features, self.heartbeat = config, features, context.heartbeat
        self.num_classes = context.val_data.num_classes
        self.train = context.loader(image_size, "train", config.samples)
        self.val = context.loader(image_size)

    def run(self, engine: nn.Module) -> Scores:
        """Measure the k-NN accuracy on the validation set."""
        engine.eval()
        return knn_accuracy(partial(self._features, engine), self.train, self.val, self.config, self.num_classes)

    def _features(self, engine: nn.Module, images: Tensor) -> Tensor:
        self.heartbeat("k-NN evaluation")
        return self.features(engine, images)
