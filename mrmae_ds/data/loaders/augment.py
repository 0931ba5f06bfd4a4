"""Fine-tuning's augmentation by timm's code, with all randomness from each sample's key.

timm draws from Python's and numpy's global generators. Both are seeded from the sample's key before each image, so
what an image becomes does not depend on threads, processes, ranks or restarts.

Shapes: B samples, S image size.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mrmae_ds.data.loaders.crop import splitmix64
from mrmae_ds.data.types import UIntArray
from mrmae_ds.errors import UserError

_POLICY_FORM = re.compile(r"rand(-((m|n|inc|mmax)\d+|(p|mstd)\d+(\.\d+)?|t(weights|3aw?)))*")
# What a sample's key is used for beside its box and flip.
_POLICY, _ERASING = 0x706F6C69, 0x65726173


@dataclass(frozen=True)
class AugmentSettings:
    """RandAugment by timm's configuration string (``rand-m9-mstd0.5-inc1``).

    Attributes:
        policy: timm's string. mean: the color, 0 to 1, that fills what a shift or rotation uncovers.
    """

    policy: str
    mean: tuple[float, float, float]


class Augment:
    """RandAugment of single images; cheap to build, to be built in the process that uses it."""

    def __init__(self, settings: AugmentSettings, size: int) -> None:
        """size: S, pixels. Raises UserError if timm does not understand the policy."""
        if not _POLICY_FORM.fullmatch(settings.policy):  # timm passes over what it does not know
            raise UserError(
                f"rand_augment: {settings.policy!r} is no RandAugment policy of timm; it is like rand-m9-mstd0.5-inc1, "
                "of the parts m, n, p, mstd, mmax, inc (each with a number) and tweights, t3a or t3aw"
            )
        fill = tuple(min(255, round(255 * value)) for value in settings.mean)
        parameters = {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        self._transform = rand_augment_transform(settings.policy, parameters)
        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, key: int) -> Image.Image:
        """One image, RGB, to another of its size."""
        seed_generators(key, _POLICY)
        return self._transform(image)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, which at its highest magnitude keeps no bit at all; Pillow 12 refuses that, earlier ones gave black."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class SampleErasing:
    """timm's random erasing, filled with noise, of normalized images, a sample at a time.

    Where and whether depends on the sample's key alone, the noise also on the kind of device.
    """

    def __init__(self, probability: float, device: torch.device) -> None:
        self._erase = RandomErasing(probability, mode="pixel", device=str(device))

    def __call__(self, images: Tensor, keys: UIntArray) -> Tensor:
        """Erase in place. images: float [B, 3, S, S]. keys: uint64 [B]. Moves torch's global generators."""
        for image, key in zip(images, keys.tolist(), strict=True):
            torch.manual_seed(seed_generators(key, _ERASING))
            self._erase(image)
        return images


def seed_generators(key: int, purpose: int) -> int:
    """Seed Python's and numpy's global generators; returns the 63-bit seed."""
    mixed = splitmix64(np.array([key], dtype=np.uint64) ^ np.uint64(purpose))
    seed = int(mixed[0]) >> 1
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    return seed
