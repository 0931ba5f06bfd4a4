"""RandAugment and erasing: timm's, and the same for a sample wherever it is computed."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from mrmae_ds.data.loaders.augment import Augment, AugmentSettings, SampleErasing, seed_generators
from mrmae_ds.data.loaders.base import Loader
from mrmae_ds.data.loaders.crop import CropSettings, sample_keys
from mrmae_ds.data.loaders.rand_augment import RandAugmentLoader
from mrmae_ds.errors import UserError
from tests.support.loaders import open_loader
from tests.support.sample_data import photograph

pytestmark = pytest.mark.timeout(180, method="thread")
POLICY = "rand-m9-mstd0.5-inc1"
SETTINGS = AugmentSettings(POLICY, (0.485, 0.456, 0.406))


def _loader(path: Path, backend: str = "ffcv", augment: AugmentSettings | None = SETTINGS, **changes: Any) -> Loader:
    settings = {"micro_batch": 8, "num_workers": 2, "seed": 5, "crop": CropSettings(scale=(0.2, 1.0))}
    return open_loader(path, backend, augment=augment, **settings | changes)


def _samples(loader: Loader, epoch: int = 1, start: int = 0) -> list[tuple[int, bytes]]:
    found = [
        (index, image.contiguous().numpy().tobytes())
        for batch in loader.epoch(epoch, start)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    ]
    loader.close()
    return found


def test_an_image_becomes_what_timm_makes_of_it() -> None:
    size, keys = 96, range(40)
    image = photograph().crop((100, 100, 100 + size, 100 + size))
    mean = tuple(round(255 * value) for value in SETTINGS.mean)
    options = {"translate_const": 43, "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    theirs, ours = rand_augment_transform(POLICY, options), Augment(SETTINGS, size)
    changed = 0
    for key in keys:
        ours(image, key + 1)  # whatever was drawn before
        result = np.asarray(ours(image, key))
        seed_generators(key, 0x706F6C69)
        assert np.array_equal(result, np.asarray(theirs(image))), key
        changed += not np.array_equal(result, np.asarray(image))
    # Two operations, each applied with probability a half: a quarter of the images stays as it is.
    assert 20 <= changed <= 38


def test_the_highest_magnitude_of_posterize_gives_black() -> None:
    """As with the Pillow that timm was written for; newer ones raise instead."""
    operations = [op for op in Augment(SETTINGS, 32)._transform.ops if op.name == "PosterizeIncreasing"]
    assert len(operations) == 1
    operations[0].prob, operations[0].magnitude_std = 1.0, 0
    for magnitude, levels in ((10, 1), (9, 2), (5, 4), (0, 16)):
        operations[0].magnitude = magnitude
        result = np.asarray(operations[0](photograph()))
        assert result.shape == (600, 512, 3) and len(np.unique(result)) == levels, magnitude


def test_each_sample_has_its_own_draw(betons: tuple[Path, Path]) -> None:
    plain, augmented = dict(_samples(_loader(betons[0], augment=None))), dict(_samples(_loader(betons[0])))
    assert plain.keys() == augmented.keys()
    changed = sum(plain[index] != augmented[index] for index in plain)
    assert 0.6 * len(plain) < changed < 0.95 * len(plain)
    assert sum(dict(_samples(_loader(betons[0]), epoch=2)).get(index) != augmented[index] for index in augmented) > 100


@pytest.mark.parametrize("backend", ["ffcv", "pillow"])
def test_pixels_do_not_depend_on_how_the_work_is_spread(betons: tuple[Path, Path], backend: str) -> None:
    whole = _samples(_loader(betons[0], backend))
    assert len(whole) == 144
    assert _samples(_loader(betons[0], backend, num_workers=1)) == whole
    assert _samples(_loader(betons[0], backend), start=9) == whole[72:]
    ranks = [_samples(_loader(betons[0], backend, micro_batch=4, world_size=2, rank=rank)) for rank in (0, 1)]
    assert dict(ranks[0] + ranks[1]) == dict(whole)


@pytest.mark.parametrize("backend", ["ffcv", "pillow"])
def test_both_backends_draw_by_the_sample(betons: tuple[Path, Path], backend: str) -> None:
    """What becomes of an image is what its key alone makes of it here; the backends differ in their pixels only."""
    plain, augmented = (dict(_samples(_loader(betons[0], backend, augment=policy))) for policy in (None, SETTINGS))
    assert len(plain) == 144 and plain.keys() == augmented.keys()
    augment = Augment(SETTINGS, 32)
    for index, pixels in plain.items():
        image = Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0))
        key = int(sample_keys(5, 1, np.array([index]))[0])
        assert np.asarray(augment(image, key)).transpose(2, 0, 1).tobytes() == augmented[index], index


def test_an_epoch_can_be_left_and_the_loader_used_again(betons: tuple[Path, Path]) -> None:
    whole = _samples(_loader(betons[0]))
    loader = _loader(betons[0])
    left = loader.epoch(0)
    next(left)
    assert _samples(loader) == whole
    with pytest.raises(RuntimeError, match="this epoch has ended"):
        next(left)
    assert _samples(loader) == whole


def test_a_batch_is_the_callers_to_keep(betons: tuple[Path, Path]) -> None:
    loader = _loader(betons[0])
    kept = [(batch, batch.images.clone()) for batch in loader.epoch(0)]
    loader.close()
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)


def test_a_dead_worker_is_an_error_and_not_a_wait(betons: tuple[Path, Path]) -> None:
    loader = _loader(betons[0])
    assert isinstance(loader, RandAugmentLoader)
    batches = loader.epoch(0)
    next(batches)
    assert loader._pool is not None
    for process in list(loader._pool._processes.values()):
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="an augmentation process died"):
        list(batches)
    loader.close()


@pytest.mark.parametrize("policy", ["auto", "rand-m9-tnonsense", "rand-mx"])
def test_a_wrong_policy_is_an_error(betons: tuple[Path, Path], policy: str) -> None:
    with pytest.raises(UserError, match=f"rand_augment: '{policy}' is not a RandAugment policy"):
        _loader(betons[0], augment=AugmentSettings(policy, (0.5, 0.5, 0.5)))


def test_erasing_depends_on_the_sample_alone() -> None:
    images, keys = torch.zeros(64, 3, 32, 32), np.arange(64, dtype=np.uint64)
    erasing = SampleErasing(0.5, torch.device("cpu"))
    whole = erasing(images.clone(), keys)
    random.seed(1), torch.manual_seed(1)
    order = torch.randperm(64)
    shuffled = erasing(images.clone(), keys[order.numpy()])
    assert torch.equal(shuffled, whole[order])
    erased = (whole != 0).flatten(1).any(1)
    assert 20 <= erased.sum() <= 44
    # A share between 2 % and a third of an erased image is normal noise, the rest untouched.
    shares = (whole != 0).any(1).flatten(1).float().mean(1)[erased]
    assert shares.min() > 0.005 and shares.max() < 0.4
    assert abs(whole[whole != 0].std() - 1) < 0.05
