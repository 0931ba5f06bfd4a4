"""Loaders of single .beton files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from mrmae_ds.config.sections import DataConfig, LoaderConfig
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.base import Loader, LoaderRequest, TrainTransform
from mrmae_ds.data.loaders.build import build_loader
from mrmae_ds.data.loaders.crop import CropSettings

CPU = torch.device("cpu")


def open_loader(
    path: Path,
    backend: str = "ffcv",
    *,
    crop: CropSettings | None = None,
    augment: AugmentSettings | None = None,
    num_workers: int = 1,
    device: torch.device = CPU,
    augment_on: Literal["cpu", "device"] = "cpu",
    **request: Any,
) -> Loader:
    """Return a loader of one .beton: 32 pixels, micro-batches of 4, one rank; for training if ``crop`` is given."""
    transform = None if crop is None else TrainTransform(crop, augment)
    values = {"image_size": 32, "micro_batch": 4, "transform": transform, **request}
    # Unchecked, for the tests of invalid settings.
    data = DataConfig.model_construct(train=path, val=path, backend=backend)
    return build_loader(
        data, LoaderConfig(num_workers=num_workers, augment_on=augment_on), LoaderRequest("train", **values), device
    )
