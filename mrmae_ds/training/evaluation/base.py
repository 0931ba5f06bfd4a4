"""Periodic evaluation of a running stage: interface and loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
from torch import nn

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.loaders.base import Batch, Loader, LoaderRequest, Split
from mrmae_ds.data.loaders.build import build_loader
from mrmae_ds.distributed.launch import Launch

if TYPE_CHECKING:
    from mrmae_ds.detection.coco import CocoSplit  # needs pycocotools

DataSet: TypeAlias = "BetonInfo | CocoSplit"
Scores = dict[str, float | int]


@dataclass(frozen=True)
class EvalContext:
    """Everything an evaluation needs beside the model.

    Attributes:
        recipe: recipe of the run.
        engine_config: engine config of the stage.
        launch: this rank among the others.
        device: device of this rank.
        val_data: validation set of the stage.
        heartbeat: called before every batch, with the current activity.
        stage_dir: output folder, in which rank 0 may write; None writes nothing.
    """

    recipe: Recipe
    engine_config: EngineConfig
    launch: Launch
    device: torch.device
    val_data: DataSet
    heartbeat: Callable[[str], None]
    stage_dir: Path | None = None

    def request(self, image_size: int, split: Split = "val", samples: int | None = None) -> LoaderRequest:
        """Return this rank's evaluation batches of one of the recipe's data sets.

        Args:
            image_size: pixels, both sides.
            split: the data set.
            samples: number of images, evenly spaced in the data set; None is all.
        """
        return LoaderRequest(
            split=split,
            image_size=image_size,
            micro_batch=self.engine_config.micro_batch,
            seed=self.recipe.seed,
            world_size=self.launch.world_size,
            rank=self.launch.rank,
            samples=samples,
        )

    def loader(self, image_size: int, split: Split = "val", samples: int | None = None) -> Loader[Batch]:
        """Return this rank's loader of a :meth:`request`, with the evaluation transform; arguments are the same."""
        request = self.request(image_size, split, samples)
        return build_loader(self.recipe.data, self.recipe.loader, request, self.device)


class Evaluator(ABC):
    """A measurement that is repeated while a stage trains. It keeps its loaders from one time to the next.

    Args:
        every_epochs: epochs between two measurements; the last epoch is always measured.
        last_epoch: number of epochs of the stage.

    Attributes:
        metrics: names of the results that are logged, with the names that they have in the log.
    """

    metrics: ClassVar[Mapping[str, str]]

    def __init__(self, every_epochs: int, last_epoch: int) -> None:
        self.every_epochs, self.last_epoch = every_epochs, last_epoch

    def due(self, epoch: int) -> bool:
        """Return True if the measurement is due after ``epoch`` epochs."""
        return epoch % self.every_epochs == 0 or epoch == self.last_epoch

    @abstractmethod
    def run(self, engine: nn.Module) -> Scores:
        """Measure. All ranks must call it; the engine is left in eval mode."""
