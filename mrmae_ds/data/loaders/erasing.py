"""Random erasing of fine-tuning by timm's code, with all randomness derived from each sample's key.

Shapes: B samples, S image size.
"""

from __future__ import annotations

import random

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mrmae_ds.data.loaders.augment import sample_seeds
from mrmae_ds.data.types import UIntArray

_PURPOSE = 0x65726173  # of a sample's key, besides those of boxes and other augmentation


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
        for index, seed in enumerate(sample_seeds(keys, _PURPOSE)):
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
