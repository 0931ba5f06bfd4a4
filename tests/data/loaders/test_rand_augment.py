"""RandAugment in both backends: a sample's augmentation does not depend on workers, ranks or restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae_ds.data.loaders.augment import Augment, AugmentSettings
from mrmae_ds.data.loaders.base import Loader
from mrmae_ds.data.loaders.crop import CropSettings, sample_keys
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN
from tests.support.loaders import open_loader

pytestmark = pytest.mark.timeout(300, method="thread")
SETTINGS = AugmentSettings(IMAGENET_MEAN, "rand-m9-mstd0.5-inc1")


def _loader(path: Path, backend: str = "ffcv", augment: AugmentSettings | None = SETTINGS, **changes: Any) -> Loader:
    settings = {"micro_batch": 8, "num_workers": 2, "seed": 5, "crop": CropSettings(scale=(0.2, 1.0))}
    return open_loader(path, backend, augment=augment, **settings | changes)


def _samples(loader: Loader, epoch: int = 1, start: int = 0) -> list[tuple[int, bytes]]:
    samples = [
        (index, image.contiguous().numpy().tobytes())
        for batch in loader.epoch(epoch, start)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    ]
    loader.close()
    return samples


def test_samples_have_independent_draws(betons: tuple[Path, Path]) -> None:
    plain, augmented = dict(_samples(_loader(betons[0], augment=None))), dict(_samples(_loader(betons[0])))
    assert plain.keys() == augmented.keys()
    changed = sum(plain[index] != augmented[index] for index in plain)
    assert 0.6 * len(plain) < changed < 0.95 * len(plain)
    later = dict(_samples(_loader(betons[0]), epoch=2))
    assert sum(later.get(index) != augmented[index] for index in augmented) > 100


@pytest.mark.parametrize("backend", ["ffcv", "pillow"])
def test_pixels_do_not_depend_on_workers_ranks_or_start_batch(betons: tuple[Path, Path], backend: str) -> None:
    whole = _samples(_loader(betons[0], backend))
    assert len(whole) == 144
    assert _samples(_loader(betons[0], backend, num_workers=1)) == whole
    assert _samples(_loader(betons[0], backend), start=9) == whole[72:]
    ranks = [_samples(_loader(betons[0], backend, micro_batch=4, world_size=2, rank=rank)) for rank in (0, 1)]
    assert dict(ranks[0] + ranks[1]) == dict(whole)


@pytest.mark.parametrize(
    ("backend", "policy"), [("ffcv", SETTINGS.policy), ("pillow", SETTINGS.policy), ("ffcv", "rand-m9-mstd0.5-t3aw")]
)
def test_augmentation_is_a_function_of_the_sample_key(betons: tuple[Path, Path], backend: str, policy: str) -> None:
    """The key alone determines the augmentation, which is Pillow's in both backends."""
    settings = AugmentSettings(IMAGENET_MEAN, policy)
    plain, augmented = (dict(_samples(_loader(betons[0], backend, augment=each))) for each in (None, settings))
    assert len(plain) == 144 and plain.keys() == augmented.keys()
    augment = Augment(settings, 32)
    for index, pixels in plain.items():
        image = Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0))
        key = int(sample_keys(5, 1, np.array([index]))[0])
        assert np.asarray(augment(image, key)).transpose(2, 0, 1).tobytes() == augmented[index], index


def test_loader_is_reusable_after_an_abandoned_epoch(betons: tuple[Path, Path]) -> None:
    whole = _samples(_loader(betons[0]))
    loader = _loader(betons[0])
    left = loader.epoch(0)
    next(left)
    assert _samples(loader) == whole
    with pytest.raises(RuntimeError, match="this epoch has ended"):
        next(left)
    assert _samples(loader) == whole


def test_kept_batches_are_not_overwritten(betons: tuple[Path, Path]) -> None:
    loader = _loader(betons[0])
    kept = [(batch, batch.images.clone()) for batch in loader.epoch(0)]
    loader.close()
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)


@pytest.mark.parametrize("policy", ["auto", "rand-m9-tnonsense", "rand-mx"])
def test_invalid_policy_is_an_error(betons: tuple[Path, Path], policy: str) -> None:
    with pytest.raises(UserError, match=f"rand_augment: '{policy}' is not a RandAugment policy"):
        _loader(betons[0], augment=AugmentSettings((0.5, 0.5, 0.5), policy))
