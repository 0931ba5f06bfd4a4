"""How many images of the validation set a model gets right, each counted once at any number of processes.

Shape legend: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.data.loaders.base import Batch, Loader, LoaderRequest, Split
from mrmae_ds.data.loaders.build import build_loader
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.process_group import sum_over_ranks

TOP = 5


def evaluation_loader(
    recipe: Recipe,
    image_size: int,
    micro_batch: int,
    launch: Launch,
    device: torch.device,
    split: Split = "val",
    samples: int | None = None,
) -> Loader:
    """Return this rank's loader of one of the recipe's data sets, with the evaluation transform.

    Args:
        recipe: its data, loader and seed are used.
        image_size: pixels, both sides.
        micro_batch: samples per batch on this rank.
        launch: ranks that share the data set.
        device: device of the batches.
        split: the data set.
        samples: number of samples, evenly spaced in the data set; None is all.
    """
    request = LoaderRequest(
        split, image_size, micro_batch, recipe.seed, world_size=launch.world_size, rank=launch.rank, samples=samples
    )
    return build_loader(recipe.data, recipe.loader, request, device)


class Score:
    """Counts a model's right answers, on the device, until they are read."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.classes = 0

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Count a batch's answers, [B, classes]; repeats that fill up the batch are not counted."""
        valid, self.classes = batch.valid, logits.shape[1]
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        first = logits.argmax(dim=1) == batch.labels
        among = (logits.topk(min(TOP, self.classes)).indices == batch.labels[:, None]).any(dim=1)
        seen = torch.stack([(first & valid).sum(), (among & valid).sum(), (losses * valid).sum(), valid.sum()])
        self.sums = self.sums.to(seen.device) + seen.double()

    def read(self, num_samples: int) -> dict[str, float | int]:
        """Over all ranks, which must all call it: ``top1`` and ``top5`` in percent, mean ``loss``, ``eval_samples``.

        ``top5`` is left out where there are no more than five classes.

        Raises:
            RuntimeError: if the images counted are not ``num_samples``.
        """
        first, among, loss, count = sum_over_ranks(self.sums).tolist()
        if count != num_samples:
            raise RuntimeError(f"evaluated {count:.0f} images of {num_samples}")
        top5 = {"top5": 100 * among / count} if self.classes > TOP else {}
        return {"top1": 100 * first / count, **top5, "loss": loss / count, "eval_samples": int(count)}


@torch.no_grad()
def evaluate(engine: nn.Module, logits: Callable[[Tensor], Tensor], reader: Loader) -> dict[str, float | int]:
    """A model's accuracy over a data set, every image once. All ranks must call it.

    Args:
        engine: put into eval mode; the caller puts it back.
        logits: uint8 images [B, 3, H, W] to float32 [B, classes].
        reader: an evaluation reader; repeats that fill up a batch are marked not valid and not counted.

    Returns:
        See :meth:`Score.read`.

    Raises:
        RuntimeError: if the images counted are not the data set's number.
    """
    engine.eval()
    score = Score()
    for batch in reader.epoch(0):
        score.add(logits(batch.images), batch)
    return score.read(reader.num_samples)
