"""Crop boxes against torchvision's rule in plain Python, and against torchvision itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop, v2

from mrmae_ds.data.loaders.crop import CropSettings, center_boxes, random_boxes, splitmix64
from mrmae_ds.errors import UserError

_WORD = (1 << 64) - 1


def _hash(state: int) -> int:
    """Apply SplitMix64's output function to Python integers."""
    z = (state + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def expected_box(
    height: int, width: int, index: int, seed: int, epoch: int, crop: CropSettings
) -> tuple[int, int, int, int, int]:
    """Return one sample's box by torchvision's rule, in scalar arithmetic."""
    key = _hash(_hash(_hash(seed) ^ epoch) ^ index)

    def draw(number: int, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((_hash((key + _hash(number)) & _WORD) >> 11) / 2**53)

    flip = int(draw(40) < crop.flip)
    for attempt in range(10):
        target = height * width * draw(4 * attempt, *crop.scale)
        ratio = math.exp(draw(4 * attempt + 1, math.log(crop.ratio[0]), math.log(crop.ratio[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(draw(4 * attempt + 2) * (height - h + 1))
            return top, int(draw(4 * attempt + 3) * (width - w + 1)), h, w, flip
    w, h = width, height
    if width / height < crop.ratio[0]:
        h = round(width / crop.ratio[0])
    elif width / height > crop.ratio[1]:
        w = round(height * crop.ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w, flip


def test_splitmix64_has_the_published_output() -> None:
    # The first outputs of the reference generator with seed 1234567; its state grows by the golden ratio.
    states = [1234567, (1234567 + 0x9E3779B97F4A7C15) & _WORD]
    published = [6457827717110365317, 3203168211198807973]
    assert splitmix64(np.array(states, dtype=np.uint64)).tolist() == published
    assert [_hash(state) for state in states] == published


@pytest.mark.parametrize(
    "crop",
    [
        CropSettings(scale=(0.2, 1.0)),
        CropSettings(scale=(0.08, 1.0), flip=0.0),
        CropSettings((0.9, 1.0), (1.0, 3.0), 1.0),
    ],
)
def test_boxes_equal_plain_python(crop: CropSettings) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 500, (400, 2))
    sizes[:4] = (10, 400), (500, 3), (32, 32), (1, 1)
    heights, widths = sizes.astype(np.int64).T
    rows = generator.integers(0, 1 << 40, 400)
    boxes = random_boxes(heights, widths, rows, seed=7, epoch=11, crop=crop)
    expected = [
        expected_box(int(h), int(w), int(i), 7, 11, crop) for h, w, i in zip(heights, widths, rows, strict=True)
    ]
    assert boxes.tolist() == [list(box) for box in expected]


def test_box_depends_only_on_seed_epoch_and_sample() -> None:
    crop, side = CropSettings(scale=(0.2, 1.0)), np.full(50, 32, dtype=np.int64)
    together = random_boxes(side, side, np.arange(50), seed=1, epoch=2, crop=crop)
    alone = random_boxes(side[:1], side[:1], np.array([33]), seed=1, epoch=2, crop=crop)
    assert together[33].tolist() == alone[0].tolist()
    for seed, epoch in ((1, 3), (2, 2)):
        other = random_boxes(side, side, np.arange(50), seed=seed, epoch=epoch, crop=crop)
        assert (together != other).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("height, width", [(20, 400), (400, 20), (100, 100)])
def test_fallback_box_equals_torchvision(height: int, width: int) -> None:
    # No attempt fits an area of nearly the whole image with ratios far from the image's.
    crop = (
        CropSettings(scale=(0.99, 1.0), ratio=(0.75, 4 / 3))
        if height != width
        else CropSettings((1.0, 1.0), (2.0, 3.0))
    )
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), list(crop.scale), list(crop.ratio))
    sizes = np.array([height]), np.array([width])
    assert random_boxes(*sizes, np.array([0]), seed=0, epoch=0, crop=crop)[0, :4].tolist() == list(expected)


def test_box_distribution_equals_torchvision() -> None:
    crop, count = CropSettings(scale=(0.2, 1.0)), 4000
    sizes = np.full(count, 180, dtype=np.int64), np.full(count, 240, dtype=np.int64)
    ours = random_boxes(*sizes, np.arange(count), seed=0, epoch=0, crop=crop)
    torch.manual_seed(0)
    image = torch.empty(3, 180, 240)
    theirs = np.array([RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(count)])
    # Quantiles of 4000 draws have a standard error below 1 % of the side.
    for column in range(4):
        quantiles = [np.quantile(boxes[:, column], [0.1, 0.5, 0.9]) for boxes in (ours, theirs)]
        assert np.abs(quantiles[0] - quantiles[1]).max() < 8
    assert abs(ours[:, 4].mean() - 0.5) < 0.04


@pytest.mark.parametrize(
    "height, width, size, box",
    [
        # 32 / 0.875 = 36.6: resized to 36, cropped to 32 from the second pixel on.
        (32, 32, 32, [2 * 32 / 36, 2 * 32 / 36, 32 * 32 / 36, 32 * 32 / 36, 0]),
        (256, 341, 224, [16, 58, 224, 224, 0]),
        # 341 x 256 and corner 58, as torchvision rounds.
        (512, 384, 224, [58 * 512 / 341, 24, 224 * 512 / 341, 336, 0]),
        (500, 375, 448, [74 * 500 / 597, 0, 448 * 500 / 597, 375, 0]),  # all of the short side; 74.5 becomes 74
        (1, 9, 32, [2 / 36, 146 / 36, 32 / 36, 32 / 36, 0]),
    ],
)
def test_center_boxes_equal_those_by_hand(height: int, width: int, size: int, box: list[float]) -> None:
    boxes = center_boxes(np.array([height]), np.array([width]), size)
    assert boxes.dtype == np.float64 and boxes.tolist() == [pytest.approx(box)]


@pytest.mark.parametrize("height, width", [(375, 500), (64, 1000), (301, 77), (224, 225)])
@pytest.mark.parametrize("size", [32, 224, 448])
def test_center_boxes_round_like_torchvision(height: int, width: int, size: int) -> None:
    short = int(size / 0.875) if size <= 224 else size
    coordinates = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).double()
    transform = v2.Compose([v2.Resize(short, antialias=False), v2.CenterCrop(size)])
    cropped = transform(coordinates)
    top, left, tall, wide, _ = center_boxes(np.array([height]), np.array([width]), size)[0]
    # The center of the crop in stored pixels; bilinear interpolation of coordinates is exact inside the image.
    middle = cropped[0].mean().item() + 0.5, cropped[1].mean().item() + 0.5
    assert (top + tall / 2, left + wide / 2) == pytest.approx(middle, abs=1e-6)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scale": (0.0, 1.0)}, "crop scale"),
        ({"scale": (0.2, 1.0), "ratio": (2.0, 1.0)}, "crop ratio"),
        ({"scale": (0.2, 1.0), "flip": 2.0}, "flip"),
    ],
)
def test_invalid_crop_is_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CropSettings(**values)
