"""How good the features of a pre-training are so far, by their nearest neighbors: nothing is trained for it.

DINO's protocol: features of length 1; the k nearest training images vote for their class with weight
exp(cosine / temperature). Each image counts once, at any number of processes.

Shape legend: B images of a batch, N of the training set (or of a part of it), C the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.config.stages import KnnConfig, PretrainConfig
from mrmae_ds.data.loaders.base import Batch, Loader
from mrmae_ds.distributed.process_group import sum_over_ranks
from mrmae_ds.training.evaluation.accuracy import evaluation_loader
from mrmae_ds.training.job import PreparedStage
from mrmae_ds.training.tasks.base import PretrainTask

Features = Callable[[Tensor], Tensor]


def dense_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """The mean of the patches' tokens, all of them visible, normalized as a new ``fc_norm`` would: float32 [B, C].

    Args:
        encoder: the bare one of a pre-training. Called as a module, because that is when ZeRO-3 gathers its weights.
        images: normalized images [B, 3, H, W].
    """
    tokens = encoder(images)[:, encoder.num_prefix_tokens :].float()
    return F.layer_norm(tokens.mean(dim=1), tokens.shape[-1:], eps=1e-6)


@dataclass(frozen=True)
class Bank:
    """Training images that vote: features [N, C] of length 1, and labels [N], the same on every rank."""

    features: Tensor
    labels: Tensor


@torch.no_grad()
def gather_bank(features: Features, reader: Loader) -> Bank:
    """The features of a reader's images, each once, on every rank. All ranks must call it.

    Args:
        features: of decoded images, uint8 [B, 3, H, W] to [B, C].
        reader: an evaluation reader; every rank has as many batches, and marks repeats as not valid.
    """
    parts = [(F.normalize(features(batch.images), dim=1), batch) for batch in reader.epoch(0)]
    own = torch.cat([part for part, _ in parts])
    labels = torch.cat([_marked(batch) for _, batch in parts])
    if dist.get_world_size() > 1:
        own, labels = _gathered(own), _gathered(labels)
    valid = labels >= 0
    return Bank(own[valid], labels[valid])


def _marked(batch: Batch) -> Tensor:
    """A batch's labels, -1 where an image is a repeat."""
    return torch.where(batch.valid, batch.labels, -1)


def _gathered(tensor: Tensor) -> Tensor:
    shares = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, tensor.contiguous())
    return torch.cat(shares)


def votes(queries: Tensor, bank: Bank, k: int, temperature: float, num_classes: int) -> Tensor:
    """The summed weights of each class, [B, classes].

    Args:
        queries: features [B, C], of any length.
        bank: at least one image; with fewer than ``k``, all of them vote.
    """
    cosines = F.normalize(queries, dim=1) @ bank.features.T
    near = cosines.topk(min(k, len(bank.labels)), dim=1)
    counts = torch.zeros(len(queries), num_classes, device=queries.device, dtype=queries.dtype)
    return counts.scatter_add_(1, bank.labels[near.indices], (near.values / temperature).exp())


@torch.no_grad()
def knn_accuracy(
    features: Features, train: Loader, val: Loader, config: KnnConfig, num_classes: int
) -> dict[str, float]:
    """``knn/top1`` in percent over the validation set, each image once. All ranks must call it.

    Raises:
        RuntimeError: if the images counted are not the validation set's number.
    """
    bank = gather_bank(features, train)
    sums = torch.zeros(2, dtype=torch.float64, device=bank.features.device)
    for batch in val.epoch(0):
        found = votes(features(batch.images), bank, config.k, config.temperature, num_classes).argmax(dim=1)
        sums += torch.stack([((found == batch.labels) & batch.valid).sum(), batch.valid.sum()])
    right, count = sum_over_ranks(sums).tolist()
    if count != val.num_samples:
        raise RuntimeError(f"looked at {count:.0f} images of {val.num_samples}")
    return {"knn/top1": 100 * right / count}


class KnnEvaluator:
    """The check of a running pre-training, with its readers, which are kept for the next time.

    Args:
        job: its pre-training has a section ``knn``. engine: wraps the job's model.
        device: of this process.
        beat: is told before every batch that the process gets on.
    """

    def __init__(
        self, job: PreparedStage, engine: deepspeed.DeepSpeedEngine, device: torch.device, beat: Callable[[], None]
    ) -> None:
        stage = job.stage
        assert isinstance(stage, PretrainConfig) and stage.knn is not None and isinstance(job.task, PretrainTask)
        self.config, self.epochs, self.num_classes = stage.knn, stage.epochs, job.val_data.num_classes
        self.engine, self.normalize, self.beat = engine, job.task.normalize, beat
        self.engine_config, self.device = job.engine_config, device
        recipe, micro_batch, launch = job.recipe, job.plan.micro_batch, job.plan.launch
        size = recipe.model.image_size
        self.train = evaluation_loader(recipe, size, micro_batch, launch, device, "train", self.config.samples)
        self.val = evaluation_loader(recipe, size, micro_batch, launch, device)

    def due(self, epochs: int) -> bool:
        """Whether it is time for it after so many epochs."""
        return epochs % self.config.every_epochs == 0 or epochs == self.epochs

    def run(self) -> dict[str, float]:
        """See :func:`knn_accuracy`; leaves the engine in eval mode."""
        self.engine.eval()
        return knn_accuracy(self._features, self.train, self.val, self.config, self.num_classes)

    def _features(self, images: Tensor) -> Tensor:
        self.beat()
        inputs = self.normalize.student(self.normalize.pixels(images), self.engine_config.model_dtype)
        with self.engine_config.autocast(self.device):
            return dense_features(self.engine.module.encoder, inputs)
