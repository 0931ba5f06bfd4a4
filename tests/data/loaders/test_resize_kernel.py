"""Integers of the resizing against the same formulas, output by output, in Python."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from mrmae_ds.data.loaders._ffcv import import_ffcv
from tests.support.sample_data import photograph

import_ffcv()

from mrmae_ds.data.loaders import jpeg_kernel  # noqa: E402

pytestmark = pytest.mark.timeout(240, method="thread")
HEIGHT, WIDTH = 61, 87


def _cubic(x: float) -> float:
    x = abs(x)
    return (1.5 * x - 2.5) * x * x + 1 if x < 1 else ((2.5 - 0.5 * x) * x - 4) * x + 2 if x < 2 else 0.0


def _resize(samples: np.ndarray, begin: float, length: float, size: int, shift: int) -> np.ndarray:
    """Resize the first axis, int [N, ...], with weights of 14 bits, and round away ``shift`` bits."""
    scale = length / size
    spread, outputs = max(scale, 1.0), []
    for place in range(size):
        center = begin + (place + 0.5) * scale
        first = max(int(begin), math.floor(center - 2 * spread + 0.5))
        end = min(math.ceil(begin + length), math.floor(center + 2 * spread + 0.5))
        shares = np.cumsum([_cubic((tap + 0.5 - center) / spread) for tap in range(first, end)])
        weights = np.diff(np.rint(2**14 * shares / shares[-1]), prepend=0).astype(int)
        outputs.append((np.tensordot(weights, samples[first:end], 1) + (1 << shift >> 1)) >> shift)
    return np.array(outputs)


def _planes(planes: np.ndarray, box: tuple[int, int, int, int, int], size: int) -> np.ndarray:
    """Resize planes [height, width, 3] to [S, S, 3] with 6 fractional bits."""
    top, left, height, width, mirrored = box
    across = _resize(_resize(planes.astype(int), top, height, size, 8).swapaxes(0, 1), left, width, size, 14)
    return (across[::-1] if mirrored else across).swapaxes(0, 1)


def _boxes() -> list[tuple[int, int, int, int, int]]:
    """Return boxes from odd and even rows and columns, of one pixel to the whole image."""
    rng = np.random.default_rng(1)
    boxes = [(0, 0, HEIGHT, WIDTH, 1), (HEIGHT - 1, WIDTH - 1, 1, 1, 0), (1, 3, 2, 3, 0), (4, 5, 57, 1, 1)]
    for _ in range(4):
        height, width = int(rng.integers(1, HEIGHT)), int(rng.integers(1, WIDTH))
        boxes.append((int(rng.integers(HEIGHT - height)), int(rng.integers(WIDTH - width)), height, width, 0))
    return boxes


def _decode(content: bytes, raw: bool, size: int) -> np.ndarray:
    boxes = np.array(_boxes(), dtype=float)
    table = np.tile([0, len(content), HEIGHT, WIDTH, raw], (len(boxes), 1))
    images, status = np.zeros((len(boxes), size, size, 3), np.uint8), np.ones(len(boxes), np.int32)
    scratch = jpeg_kernel.make_scratch(table, size, 2)
    file, sums, rows = np.frombuffer(content, np.uint8), np.full(len(boxes), -1), np.arange(len(boxes))
    jpeg_kernel.decode(file, table, sums, rows, boxes, False, images, scratch, status)
    jpeg_kernel.free_scratch(scratch)
    assert not status.any()
    return images


SIZES = [1, 3, 7, 8, 16, 25, 64]  # strongly reduced to enlarged; multiples of the vectors' lengths, and others


@pytest.mark.parametrize("size", SIZES)
def test_raw_pixels_equal_the_formulas(size: int) -> None:
    pixels = np.asarray(photograph().crop((200, 100, 200 + WIDTH, 100 + HEIGHT)))
    for box, image in zip(_boxes(), _decode(pixels.tobytes(), True, size), strict=True):
        assert np.array_equal(image, ((_planes(pixels, box, size) + 32) >> 6).clip(0, 255))


@pytest.mark.parametrize("size", SIZES)
def test_colors_equal_the_formulas(size: int) -> None:
    stream = io.BytesIO()
    photograph().crop((200, 100, 200 + WIDTH, 100 + HEIGHT)).save(stream, "JPEG", quality=90, subsampling="4:4:4")
    opened = Image.open(stream)
    opened.draft("YCbCr", opened.size)
    planes = np.asarray(opened)
    for box, image in zip(_boxes(), _decode(stream.getvalue(), False, size), strict=True):
        y, cb, cr = np.moveaxis(_planes(planes, box, size), 2, 0)
        cb, cr, y = cb - 128 * 64, cr - 128 * 64, y << 14
        colors = np.stack([y + 22970 * cr, y - 5638 * cb - 11700 * cr, y + 29032 * cb], axis=2)
        assert np.array_equal(image, ((colors + (1 << 19)) >> 20).clip(0, 255))
