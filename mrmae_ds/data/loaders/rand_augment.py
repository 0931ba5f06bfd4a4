"""RandAugment and color jitter of whole batches, in the threads that decode them.

Shapes: B samples, S image size.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from mrmae_ds.data.loaders.augment import Augment, AugmentSettings, PolicyDraws
from mrmae_ds.data.loaders.augment_kernel import augment, make_scratch
from mrmae_ds.data.types import ImageArray, UIntArray


class BatchAugment:
    """RandAugment and color jitter on T threads: the pixels of ``Augment``, bit for bit.

    A policy with timm's blur (``t3a``, ``t3aw``), which the kernel lacks, is applied by Pillow, in one thread.

    Args:
        settings: policy, color jitter and fill color.
        size: S, pixels.
        threads: T.
    """

    def __init__(self, settings: AugmentSettings, size: int, threads: int) -> None:
        self._draws = PolicyDraws(settings, size)
        self._pillow = None if self._draws.complete else Augment(settings, size)
        self._fill = np.array(settings.fill, dtype=np.uint8)
        self._scratch = make_scratch(size, threads)

    def __call__(self, images: ImageArray, keys: UIntArray) -> None:
        """Augment in place.

        Args:
            images: uint8 [B, S, S, 3].
            keys: uint64 [B], of the samples.
        """
        if self._pillow is None:
            augment(images.reshape(*images.shape[:2], -1), *self._draws(keys), self._fill, self._scratch)
            return
        for image, key in zip(images, keys.tolist(), strict=True):
            image[:] = np.asarray(self._pillow(Image.fromarray(image), key))
