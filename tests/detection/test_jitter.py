"""Large-scale jitter: reference cases, pixels of an independent path, statistics, and masks that follow the image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mrmae_ds.detection.jitter import (
    Jitter,
    JitterSettings,
    boxes_of_masks,
    eval_jitter,
    jitter_image,
    jitter_masks,
    jitter_numbers,
    jitter_of,
)
from tests.fixtures import load_json
from tests.support.sample_data import photograph

CASES = load_json("large_scale_jitter")["cases"]


@pytest.mark.parametrize("case", CASES)
def test_sizes_and_offsets_are_the_references(case: dict) -> None:
    jitter = jitter_of(case["u"], *case["input"], JitterSettings(case["target"]))
    expected = case["flip"], *(tuple(case[key]) for key in ("resized", "offset", "output"))
    assert tuple(jitter) == expected


def test_statistics_at_1024() -> None:
    """Mean scale, filled share of the square and share of cropped images of 640 x 480 at 1024 pixels."""
    settings, draws = JitterSettings(1024), 20_000
    jitters = [jitter_of(jitter_numbers(0, 3, row), 480, 640, settings) for row in range(draws)]
    resized, sizes = np.array([j.resized for j in jitters]), np.array([j.size for j in jitters])
    assert resized[:, 1].mean() / 1024 == pytest.approx(1.05, rel=0.01)
    assert sizes.prod(axis=1).mean() / 1024**2 == pytest.approx(0.633, rel=0.01)
    assert (sizes < resized).any(axis=1).mean() == pytest.approx(1 / 1.9, rel=0.01)
    assert np.mean([j.mirrored for j in jitters]) == pytest.approx(0.5, rel=0.02)


def test_numbers_are_a_function_of_seed_epoch_and_row() -> None:
    numbers = {key: tuple(jitter_numbers(*key)) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(set(numbers.values())) == 4
    assert all(tuple(jitter_numbers(*key)) == value for key, value in numbers.items())
    # To the last bit, since a run is resumed under another version.
    first = [8952269183095087, 3184204398199989, 7178425989725091]
    assert [int(number * 2**53) for number in jitter_numbers(0, 0, 0)] == first


def test_pixels_equal_resizing_and_cropping_one_after_the_other() -> None:
    image = photograph().crop((100, 100, 260, 220))  # 160 x 120
    jitter = jitter_of((0.2, 0.9, 0.7), 120, 160, JitterSettings(128))
    assert jitter == Jitter(True, (174, 232), (32, 73), (128, 128))
    flipped = Image.fromarray(np.asarray(image)[:, ::-1])
    resized = np.asarray(flipped.resize((232, 174), Image.Resampling.BILINEAR))
    assert np.array_equal(jitter_image(image, jitter), resized[32:160, 73:201])


@pytest.mark.parametrize("numbers", [(0.9, 0.95, 0.3), (0.1, 0.95, 0.6), (0.1, 0.2, 0.5)])
def test_masks_follow_the_image(numbers: tuple[float, float, float]) -> None:
    """Masks equal Pillow's nearest neighbor; boxes are those of the pixels."""
    shapes = np.zeros((2, 120, 160), dtype=np.uint8)
    shapes[0, 30:90, 20:140], shapes[1, 50:70, 60:] = 1, 1
    shapes[0, 40:50, 100:150] = 1
    masks = [mask_api.encode(np.asfortranarray(shape)) for shape in shapes]
    jitter = jitter_of(numbers, 120, 160, JitterSettings(128))
    (top, left), (height, width) = jitter.corner, jitter.size
    ours = jitter_masks(masks, jitter)
    assert ours.shape == (2, width, height)
    boxes = boxes_of_masks(ours)
    for shape, mask, box in zip(shapes, ours, boxes, strict=True):
        source = Image.fromarray(shape[:, ::-1] if jitter.mirrored else shape)
        resized = np.asarray(source.resize(jitter.resized[::-1], Image.Resampling.NEAREST))
        expected = resized[top : top + height, left : left + width]
        assert np.array_equal(mask.T, expected)
        rows, columns = np.nonzero(expected)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_no_masks() -> None:
    jitter = jitter_of((0.9, 0.5, 0.5), 120, 160, JitterSettings(128))
    assert jitter_masks([], jitter).shape == (0, *jitter.size[::-1])
    assert boxes_of_masks(jitter_masks([], jitter)).shape == (0, 4)


@pytest.mark.parametrize(
    ("height", "width", "resized"),
    [
        (480, 640, (768, 1024)),
        (640, 427, (1024, 683)),
        (1024, 1024, (1024, 1024)),
        (500, 333, (1024, 682)),
        (3, 4000, (1, 1024)),
    ],
)
def test_evaluation_resizes_the_longer_side(height: int, width: int, resized: tuple[int, int]) -> None:
    assert eval_jitter(height, width, 1024) == Jitter(False, resized, (0, 0), resized)


def test_a_thin_image_keeps_a_pixel() -> None:
    jitter = jitter_of((0.9, 0.0, 0.0), 2, 640, JitterSettings(128))
    assert jitter.resized == jitter.size == (1, 13)
