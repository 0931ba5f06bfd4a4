"""RandAugment on a device against Pillow, bit for bit, and behind the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae_ds.data.loaders.augment import Augment, AugmentSettings
from mrmae_ds.data.loaders.augment_device import DeviceAugment
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN
from tests.support.loaders import open_loader
from tests.support.sample_data import hard_images

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"),
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize(
    ("policy", "jitter"),
    [("rand-m9-mstd0.5-inc1", 0.0), ("rand-m5-n3-p0.9", 0.4), ("rand-m30-mmax40-p1.0-inc1", 0.0), (None, 0.4)],
)
def test_pixels_equal_timm_on_pillow(policy: str | None, jitter: float, size: int, device: torch.device) -> None:
    settings, keys = AugmentSettings(IMAGENET_MEAN, policy, jitter), np.arange(150, dtype=np.uint64)
    images = np.stack([hard_images(size)[key % 4] for key in keys.tolist()])
    batch = torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2)
    result = DeviceAugment(settings, size, device)(batch, keys)
    assert result.shape == batch.shape and result.stride() == batch.stride()
    pillow = Augment(settings, size)
    for image, changed, key in zip(images, result.permute(0, 2, 3, 1).cpu().numpy(), keys.tolist(), strict=True):
        assert np.array_equal(changed, np.asarray(pillow(Image.fromarray(image), key))), key


@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=pytest.mark.ffcv), "pillow"])
def test_the_place_changes_no_pixel(betons: tuple[Path, Path], backend: str) -> None:
    settings, crop = AugmentSettings(IMAGENET_MEAN, "rand-m9-mstd0.5-inc1"), CropSettings(scale=(0.2, 1.0))
    epochs = []
    places: tuple[Literal["cpu", "device"], ...] = ("cpu", "device")
    for place in places:
        loader = open_loader(betons[0], backend, crop=crop, augment=settings, augment_on=place, micro_batch=8, seed=5)
        epochs.append([(batch.indices, batch.images.clone()) for batch in loader.epoch(1, 12)])
        loader.close()
    assert len(epochs[0]) == 6
    for one, other in zip(*epochs, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_policy_with_blur_is_refused() -> None:
    with pytest.raises(UserError, match=r"augment_on: device lacks timm's blur.*t3aw.*use cpu"):
        DeviceAugment(AugmentSettings(IMAGENET_MEAN, "rand-m9-t3aw"), 32, torch.device("cpu"))
