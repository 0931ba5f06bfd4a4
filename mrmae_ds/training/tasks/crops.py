"""Base class of the tasks that train on random crops of images from .beton files."""

from __future__ import annotations

from typing import TypeVar

import torch

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import CropStageConfig
from mrmae_ds.data.beton.copies import count_val_copies
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton
from mrmae_ds.data.loaders.base import Batch, Loader, LoaderRequest, TrainTransform
from mrmae_ds.data.loaders.build import build_loader, check_backend, check_loader_memory
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.data.node_cache import cache_all
from mrmae_ds.errors import UserError
from mrmae_ds.training.tasks.base import Task
from mrmae_ds.units import describe_difference

CropConfigT = TypeVar("CropConfigT", bound=CropStageConfig)


class CropTask(Task[CropConfigT]):
    """A stage that trains on random crops."""

    @staticmethod
    def open_data(recipe: Recipe) -> tuple[BetonInfo, BetonInfo]:
        """Open and check both sets."""
        for backend in {recipe.data.backend, recipe.data.val_backend}:
            check_backend(backend)
        train, val = check_beton(recipe.data.train), check_beton(recipe.data.val)
        if train.class_names != val.class_names:
            raise UserError(
                f"data.train and data.val: {train.path} and {val.path} name different classes "
                f"({train.num_classes} and {val.num_classes}; "
                f"{describe_difference(train.class_names, val.class_names)}); write both from the same tree"
            )
        return train, val

    def prepare_data(self, recipe: Recipe, request: LoaderRequest) -> None:
        """Check the memory that loaders share with their processes, and copy the files to the node's cache."""
        check_loader_memory(recipe.data, recipe.loader, request)
        paths = [recipe.data.train, recipe.data.val] if self.reads_val_data else [recipe.data.train]
        cache_all(paths, recipe.loader.cache_dir)

    def train_loader(
        self, recipe: Recipe, data: BetonInfo, request: LoaderRequest, device: torch.device
    ) -> Loader[Batch]:
        """Open this rank's share of the training set."""
        return build_loader(recipe.data, recipe.loader, request, device)

    def count_copies(self, train: BetonInfo, val: BetonInfo) -> int | None:
        """Count validation images that are exact copies of training images."""
        return count_val_copies(train, val)

    @property
    def transform(self) -> TrainTransform:
        """Crops, flips and augmentation of the training images."""
        return TrainTransform(CropSettings(scale=self.config.crop_scale, flip=self.config.flip), self.augment)

    @property
    def reads_val_data(self) -> bool:
        """True if the stage reads the validation set while training."""
        return True
