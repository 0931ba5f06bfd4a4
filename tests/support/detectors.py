"""Small detectors, and the batch and weights of the reference values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrmae_ds.config.detection import DetectConfig, DetectorConfig
from mrmae_ds.detection.detector import Detector
from mrmae_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from mrmae_ds.models.pyramid import SimplePyramid
from mrmae_ds.models.sizes import CViTSpec
from mrmae_ds.models.windowed import build_windowed
from mrmae_ds.weights.detectors import detector_of, load_detector_file
from mrmae_ds.weights.load import LoadReport
from mrmae_ds.weights.resolve import resolve

SPEC = CViTSpec((8, 16, 24), (1, 1, 3), 2)
SIDE, NUM_CLASSES = 128, 5
CONFIG = DetectorConfig(window=5, global_blocks=(1,), channels=16, fc=32)
Targets = list[dict[str, Tensor]]


def small_detector(seed: int | None = 0, num_classes: int = NUM_CLASSES) -> Detector:
    """Return the detector of the reference values with random weights."""
    if seed is not None:
        torch.manual_seed(seed)
    return Detector(SimplePyramid(build_windowed(SPEC, SIDE, 5, (1,), 64), 16), CONFIG, num_classes)


def load_whole(detector: Detector, path: Path) -> LoadReport:
    """Load a file of a whole detector."""
    file = detector_of(resolve(path))
    assert file is not None
    return load_detector_file(detector, file)


def reference_batch(reference: dict[str, Tensor]) -> tuple[Tensor, list[tuple[int, int]], Targets]:
    """Return images [3, 3, 128, 128], sizes and targets of mask_rcnn.npz; the second image has no object."""
    images, sizes, targets = torch.zeros(3, 3, SIDE, SIDE), [], []
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for i in range(3):
        _, height, width = reference[f"image{i}"].shape
        images[i, :, :height, :width] = (reference[f"image{i}"] / 255 - mean) / std
        sizes.append((height, width))
        labels = reference[f"classes{i}"].long() + 1
        targets.append({"boxes": reference[f"boxes{i}"], "labels": labels, "masks": reference[f"masks{i}"].byte()})
    return images, sizes, targets


def random_batch(counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, list[tuple[int, int]], Targets]:
    """Return images of noise with that many random rectangles as objects each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), 3, SIDE, SIDE, generator=generator)
    targets = []
    for count in counts:
        corner = torch.randint(0, SIDE // 2, (count, 2), generator=generator)
        sides = torch.randint(8, SIDE // 2, (count, 2), generator=generator)
        boxes = torch.cat([corner, corner + sides], dim=1)
        masks = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, NUM_CLASSES + 1, (count,), generator=generator)
        targets.append({"boxes": boxes.float(), "labels": labels, "masks": masks})
    return images, [(SIDE, SIDE)] * len(counts), targets


def detect_config(**changes: Any) -> DetectConfig:
    """Return the stage of a Base model at 1024 pixels, with some keys changed."""
    values: dict[str, Any] = {"epochs": 25, "optimizer": {"lr": 1e-4}, "layer_decay": 0.8}
    return DetectConfig.model_validate({**values, "detector": {"global_blocks": [1, 4, 7, 10]}, **changes})
