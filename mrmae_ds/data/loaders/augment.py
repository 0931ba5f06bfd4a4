"""Augmentation, of fine-tuning by timm's code, with all randomness derived from each sample's key.

timm draws from Python's and numpy's global generators. Both are seeded by the sample's key before each image, so the
result does not depend on threads, processes, ranks or restarts.

Shapes: B samples, S image size.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mrmae_ds.data.loaders.crop import splitmix64
from mrmae_ds.data.types import UIntArray
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import Rgb

_POLICY_FORM = re.compile(r"rand(-((m|n|inc|mmax)\d+|(p|mstd)\d+(\.\d+)?|t(weights|3aw?)))*")
# Uses of a sample's key besides its box and flip.
_POLICY, _ERASING, _JITTER = 0x706F6C69, 0x65726173, 0x6A697474


@dataclass(frozen=True)
class AugmentSettings:
    """Settings of RandAugment and color jitter.

    Attributes:
        mean: color, 0 to 1, of the area that a shift or rotation uncovers.
        policy: timm's configuration string (``rand-m9-mstd0.5-inc1``); None is no RandAugment.
        color_jitter: largest relative change of brightness, contrast and saturation; 0 is none.
    """

    mean: Rgb
    policy: str | None = None
    color_jitter: float = 0.0


class Augment:
    """Color jitter and RandAugment of single images, to be built in the process that uses it.

    Args:
        settings: policy, fill color and jitter.
        size: S, pixels.

    Raises:
        UserError: if the policy is invalid.
    """

    def __init__(self, settings: AugmentSettings, size: int) -> None:
        self._jitter, self._transform = settings.color_jitter, None
        if settings.policy is None:
            return
        if not _POLICY_FORM.fullmatch(settings.policy):  # timm ignores unknown parts
            raise UserError(
                f"rand_augment: {settings.policy!r} is not a RandAugment policy of timm; expected a form like "
                "rand-m9-mstd0.5-inc1, of parts m, n, p, mstd, mmax, inc (each with a number), tweights, t3a, t3aw"
            )
        fill = tuple(min(255, round(255 * value)) for value in settings.mean)
        parameters = {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        self._transform = rand_augment_transform(settings.policy, parameters)
        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, key: int) -> Image.Image:
        """Augment one RGB image; its size stays."""
        if self._jitter:
            seed_generators(key, _JITTER)
            image = _jitter(image, self._jitter)
        if self._transform is None:
            return image
        seed_generators(key, _POLICY)
        return self._transform(image)


def _jitter(image: Image.Image, strength: float) -> Image.Image:
    """Change brightness, contrast and saturation in random order, as torchvision's ColorJitter does."""
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    random.shuffle(enhancers)
    for enhancer in enhancers:
        image = enhancer(image).enhance(random.uniform(1 - strength, 1 + strength))
    return image


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Apply timm's posterize, which keeps 0 bits at its highest magnitude: black before Pillow 12, which refuses it."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class SampleErasing:
    """timm's random erasing of normalized images, filled with noise.

    The area depends on the sample's key alone, the noise also on the kind of device.

    Args:
        probability: of erasing in an image.
        device: of the images.
    """

    def __init__(self, probability: float, device: torch.device) -> None:
        # timm chooses the areas. It would also seed and draw by torch's global generators, image by image.
        self._choose = RandomErasing(probability, mode="const", device="cpu")
        self._noise = torch.Generator(device)

    def __call__(self, images: Tensor, keys: UIntArray) -> Tensor:
        """Erase in place; changes the state of Python's global generator.

        Args:
            images: float [B, 3, S, S].
            keys: uint64 [B], of the samples.

        Returns:
            ``images``.
        """
        for index, seed in enumerate(_seeds(keys, _ERASING)):
            random.seed(seed)
            area = _Area(images.shape[1:])
            self._choose(area)
            if area.place is not None:
                erased = images[index][area.place]
                noise = torch.empty(erased.shape, dtype=images.dtype, device=images.device)
                erased.copy_(noise.normal_(generator=self._noise.manual_seed(seed)))
        return images


class _Area:
    """Stands in for an image [3, S, S], and keeps the area that timm writes to.

    Attributes:
        place: index of the area; None if nothing was written.
    """

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape
        self.place: tuple[slice, ...] | None = None

    def size(self) -> torch.Size:
        """Return the shape."""
        return self._shape

    def __setitem__(self, place: tuple[slice, ...], values: Tensor) -> None:
        self.place = place


def seed_generators(key: int, purpose: int) -> int:
    """Seed Python's and numpy's global generators.

    Args:
        key: of the sample.
        purpose: constant that separates the uses of a key.

    Returns:
        The 63-bit seed.
    """
    (seed,) = _seeds(np.array([key], dtype=np.uint64), purpose)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    return seed


def _seeds(keys: UIntArray, purpose: int) -> list[int]:
    """Return a 63-bit seed for each key."""
    return (splitmix64(keys ^ np.uint64(purpose)) >> np.uint64(1)).tolist()
