"""RandAugment and random erasing against timm, and their dependence on the sample's key alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import functional

from mrmae_ds.data.loaders.augment import Augment, AugmentSettings, Change, PolicyDraws
from mrmae_ds.data.loaders.crop import splitmix64
from mrmae_ds.data.loaders.erasing import SampleErasing
from mrmae_ds.imagenet import IMAGENET_MEAN
from tests.support.sample_data import photograph

pytestmark = pytest.mark.timeout(180, method="thread")
POLICY = "rand-m9-mstd0.5-inc1"
SETTINGS = AugmentSettings(IMAGENET_MEAN, POLICY)


def _seed_generators(key: int, purpose: int) -> int:
    """Seed the global generators, which timm draws from, as the project seeds its own."""
    seed = int(splitmix64(np.array([key], dtype=np.uint64) ^ np.uint64(purpose))[0]) >> 1
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    return seed


def test_augment_equals_timm() -> None:
    size, keys = 96, range(40)
    image = photograph().crop((100, 100, 100 + size, 100 + size))
    mean = tuple(round(255 * value) for value in SETTINGS.mean)
    options = {"translate_const": 43, "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    theirs, ours = rand_augment_transform(POLICY, options), Augment(SETTINGS, size)
    changed = 0
    for key in keys:
        ours(image, key + 1)  # an earlier draw has no effect
        result = np.asarray(ours(image, key))
        _seed_generators(key, 0x706F6C69)
        assert np.array_equal(result, np.asarray(theirs(image))), key
        changed += not np.array_equal(result, np.asarray(image))
    # Two operations, each applied with probability a half: a quarter of the images stays as it is.
    assert 20 <= changed <= 38


def test_draws_have_the_distribution_of_the_policy() -> None:
    """15 operations with the same probability, each applied in half of the cases, at magnitudes of N(9, 0.5)."""
    count = 4000
    codes, arguments = PolicyDraws(SETTINGS, 224)(np.arange(count, dtype=np.uint64))
    assert abs((codes != Change.NONE).mean() - 0.5) < 0.02
    shares = np.bincount(codes[codes != Change.NONE], minlength=12)[1:] / (codes != Change.NONE).sum()
    expected = np.array([1] * 10 + [5]) / 15  # the five geometric operations are one kind of change
    assert abs(shares - expected).max() < 0.02
    factors = arguments[codes == Change.BRIGHTNESS, 0]  # 1 +- 0.09 for each magnitude, at most 10
    assert abs(abs(factors - 1).mean() - 0.81) < 0.01 and 0.35 < (factors > 1).mean() < 0.65
    assert factors.min() >= 0.1 and factors.max() <= 1.9


def test_draws_leave_the_global_generators_alone() -> None:
    """Mixup and erasing draw from them at the same time, in another thread."""

    def states() -> tuple[object, list[int]]:
        return random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    before = states()
    PolicyDraws(SETTINGS, 224)(np.arange(10, dtype=np.uint64))
    Augment(SETTINGS, 600)(photograph(), 3)
    assert states() == before


def test_color_jitter_is_torchvisions_by_the_sample_alone() -> None:
    """Against torchvision's functions, with the order and the factors that a generator of the sample's key gives."""
    image, size = photograph().crop((100, 100, 196, 196)), 96
    jitter = Augment(AugmentSettings(IMAGENET_MEAN, color_jitter=0.4), size)
    changes = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    for key in range(8):
        jitter(image, key + 1)
        found = np.asarray(jitter(image, key))
        seed = splitmix64(np.array([key ^ 0x6A697474], dtype=np.uint64))[0] >> np.uint64(1)
        generator, expected, order = random.Random(int(seed)), image, list(changes)
        generator.shuffle(order)
        for change in order:
            expected = change(expected, generator.uniform(0.6, 1.4))
        assert np.array_equal(found, np.asarray(expected)) and not np.array_equal(found, np.asarray(image))
    both = Augment(AugmentSettings(IMAGENET_MEAN, POLICY, 0.4), size)
    assert np.array_equal(np.asarray(both(image, 3)), np.asarray(Augment(SETTINGS, size)(jitter(image, 3), 3)))


def test_posterize_at_highest_magnitude_gives_black() -> None:
    """Pillow before 12 gave black; newer versions raise."""
    operations = [op for op in Augment(SETTINGS, 32)._transform.ops if op.name == "PosterizeIncreasing"]
    assert len(operations) == 1
    operations[0].prob, operations[0].magnitude_std = 1.0, 0
    for magnitude, levels in ((10, 1), (9, 2), (5, 4), (0, 16)):
        operations[0].magnitude = magnitude
        result = np.asarray(operations[0](photograph()))
        assert result.shape == (600, 512, 3) and len(np.unique(result)) == levels, magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_erasing_equals_timm(dtype: torch.dtype) -> None:
    images, keys = torch.zeros(40, 3, 48, 48, dtype=dtype), np.arange(40, dtype=np.uint64)
    theirs = RandomErasing(0.5, mode="pixel", device="cpu")
    expected = images.clone()
    for image, key in zip(expected, keys.tolist(), strict=True):
        torch.manual_seed(_seed_generators(key, 0x65726173))
        theirs(image)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(SampleErasing(0.5, torch.device("cpu"))(images, keys), expected)
    assert torch.equal(torch.get_rng_state(), before) and expected.any()


def test_erasing_depends_only_on_the_sample() -> None:
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
