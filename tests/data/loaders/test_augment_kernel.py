"""The RandAugment kernel against Pillow and timm, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import timm.data.auto_augment as timm
from PIL import Image

from mrmae_ds.data.loaders.augment import Augment, AugmentSettings, Change
from mrmae_ds.imagenet import IMAGENET_MEAN
from tests.support.sample_data import hard_images

pytest.importorskip("ffcv")

from mrmae_ds.data.loaders.augment_kernel import augment, make_scratch
from mrmae_ds.data.loaders.rand_augment import BatchAugment

pytestmark = [pytest.mark.ffcv, pytest.mark.timeout(300, method="thread")]
FILL = (124, 116, 104)
OPTIONS = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}
FACTORS = (0.0, 0.1, 0.19, 0.5, 0.77777, 1.0, 1.3, 1.81, 1.9)


def _check(
    size: int, change: Change, values: tuple[float, ...], expected: Callable[[Image.Image], Image.Image]
) -> None:
    images = np.stack(hard_images(size))
    arguments = np.zeros((len(images), 1, 6))
    arguments[:, 0, : len(values)] = values
    results = images.copy()
    codes = np.full((len(images), 1), change, dtype=np.int64)
    augment(
        results.reshape(*images.shape[:2], -1), codes, arguments, np.array(FILL, dtype=np.uint8), make_scratch(size, 1)
    )
    for image, result in zip(images, results, strict=True):
        assert np.array_equal(result, np.asarray(expected(Image.fromarray(image)))), (change, values)


@pytest.mark.parametrize("size", [7, 32, 97])
def test_changes_of_values_equal_pillow(size: int) -> None:
    _check(size, Change.AUTO_CONTRAST, (), timm.auto_contrast)
    _check(size, Change.EQUALIZE, (), timm.equalize)
    _check(size, Change.INVERT, (), timm.invert)
    for bits in range(1, 8):
        _check(size, Change.POSTERIZE, (bits,), lambda image, bits=bits: timm.posterize(image, bits))  # type: ignore[misc]
    for level in (0, 1, 26, 99, 128):
        _check(size, Change.SOLARIZE, (2 * level,), lambda image, level=level: timm.solarize(image, 2 * level))  # type: ignore[misc]
        _check(size, Change.SOLARIZE_ADD, (level,), lambda image, level=level: timm.solarize_add(image, level))  # type: ignore[misc]


@pytest.mark.parametrize("size", [7, 32, 97])
@pytest.mark.parametrize("change", [Change.COLOR, Change.CONTRAST, Change.BRIGHTNESS, Change.SHARPNESS])
def test_blends_equal_pillow(size: int, change: Change) -> None:
    function = getattr(timm, change.name.lower())
    for factor in FACTORS:
        _check(size, change, (factor,), lambda image, factor=factor: function(image, factor))  # type: ignore[misc]


@pytest.mark.parametrize("size", [7, 32, 97])
def test_geometry_equals_pillow(size: int) -> None:
    matrices = [(1.0, shear, 0.0, 0.0, 1.0, 0.0) for shear in (-0.3, 0.0, 0.1, 0.27)]
    matrices += [(1.0, 0.0, 0.0, shear, 1.0, 0.0) for shear in (-0.3, 0.1, 0.27)]
    matrices += [(1.0, 0.0, way * size, 0.0, 1.0, 0.0) for way in (-0.45, 0.25, 0.4123, 1.5)]
    matrices += [(1.0, 0.0, 0.0, 0.0, 1.0, way * size) for way in (-0.45, 0.25, 0.4123, 1.5)]
    matrices += [(0.9, 0.3, 1.5, -0.2, 1.1, -2.25), (-1.0, 0.0, size, 0.0, -1.0, size)]
    for matrix in matrices:
        _check(
            size,
            Change.AFFINE,
            matrix,
            lambda image, matrix=matrix: image.transform(image.size, Image.Transform.AFFINE, matrix, **OPTIONS),  # type: ignore[misc]
        )


@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize(
    ("policy", "jitter"),
    [
        ("rand-m9-mstd0.5-inc1", 0.0),
        ("rand-m5-n3-p0.9", 0.0),
        ("rand-m9-mstd101-tweights", 0.4),
        ("rand-m30-mmax40-p1.0-inc1", 0.0),
        (None, 0.4),
    ],
)
def test_whole_policies_equal_timm_on_pillow(policy: str | None, jitter: float, size: int) -> None:
    """Draws included: rotations by right angles and by nothing, magnitudes beyond 10, weighted choices."""
    settings = AugmentSettings(IMAGENET_MEAN, policy, jitter)
    keys = np.arange(150, dtype=np.uint64)
    images = np.stack([hard_images(size)[key % 3] for key in keys.tolist()])
    results = images.copy()
    BatchAugment(settings, size, 2)(results, keys)
    pillow, changed = Augment(settings, size), 0
    for image, result, key in zip(images, results, keys.tolist(), strict=True):
        assert np.array_equal(result, np.asarray(pillow(Image.fromarray(image), key))), key
        changed += not np.array_equal(image, result)
    assert changed > 100


def test_pixels_do_not_depend_on_threads_or_batches() -> None:
    settings, keys = AugmentSettings(IMAGENET_MEAN, "rand-m9-mstd0.5-inc1"), np.arange(20, dtype=np.uint64)
    images = np.stack([hard_images(48)[0]] * len(keys))
    whole, parts = images.copy(), images[::-1].copy()
    BatchAugment(settings, 48, 1)(whole, keys)
    three = BatchAugment(settings, 48, 3)
    three(parts[:7], keys[::-1][:7])
    three(parts[7:], keys[::-1][7:])
    assert np.array_equal(parts[::-1], whole)
