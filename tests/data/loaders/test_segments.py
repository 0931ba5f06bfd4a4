"""Decoding of the segments that a box touches, against decoding of the whole image."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae_ds.data.beton.segments import MAGIC, add_index, describe_damage, read_header
from mrmae_ds.data.convert import jpegs
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.data.loaders._ffcv import import_ffcv
from mrmae_ds.data.loaders.crop import CropSettings
from tests.support.jpegs import Files, stored_jpegs
from tests.support.loaders import open_loader
from tests.support.sample_data import photograph

import_ffcv()

import cv2  # noqa: E402, FFCV's dependency; sets all samplings and restart intervals

from mrmae_ds.data.loaders import jpeg_kernel  # noqa: E402

pytestmark = pytest.mark.timeout(240, method="thread")
SAMPLINGS = {name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in ("444", "422", "420", "440", "411")}
SIZES = [(1, 1), (7, 9), (16, 16), (33, 17), (64, 96), (97, 203), (301, 203), (250, 128), (129, 480)]  # width, height
EPOCHS = 6  # boxes of each JPEG


def _encode(size: tuple[int, int], sampling: str, interval: int) -> bytes:
    pixels = np.asarray(photograph().resize(size))[:, :, ::-1]
    options = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_OPTIMIZE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    if sampling == "gray":
        pixels = pixels[:, :, 1]
    else:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]]
    return cv2.imencode(".jpg", np.ascontiguousarray(pixels), options)[1].tobytes()


def _all_intervals(size: tuple[int, int], sampling: str) -> list[bytes]:
    """Return JPEGs with every restart interval that divides the row's MCUs."""
    header = read_header(_encode(size, sampling, 0))
    assert header is not None and header.plain and header.size == size
    across = header.blocks[0]
    return [_encode(size, sampling, interval) for interval in range(1, across + 1) if across % interval == 0]


def _decode(
    jpegs: list[bytes], boxes: np.ndarray, size: int, beyond: bool, checksums: list[int] | None = None
) -> tuple[np.ndarray, list[int]]:
    offsets = np.cumsum([0, *map(len, jpegs)])
    sides = [Image.open(io.BytesIO(jpeg)).size[::-1] for jpeg in jpegs]
    table = np.array([[offset, len(jpeg), *side, 0] for offset, jpeg, side in zip(offsets, jpegs, sides, strict=False)])
    sums = np.array([zlib.adler32(jpeg) for jpeg in jpegs] if checksums is None else checksums)
    images, status = np.zeros((len(jpegs), size, size, 3), np.uint8), np.full(len(jpegs), -1, np.int32)
    scratch = jpeg_kernel.make_scratch(table, size, 2)
    content, rows = np.frombuffer(b"".join(jpegs), np.uint8), np.arange(len(jpegs))
    jpeg_kernel.decode(content, table, sums, rows, boxes, beyond, images, scratch, status)
    jpeg_kernel.free_scratch(scratch)
    return images, status.tolist()


def _boxes(jpegs: list[bytes], rng: np.random.Generator, fractional: bool) -> np.ndarray:
    """Return random boxes inside the images, of a pixel to the whole image, also along the borders."""
    sides = np.array([Image.open(io.BytesIO(jpeg)).size[::-1] for jpeg in jpegs], dtype=float)
    lengths = np.maximum(1, np.rint(sides * rng.uniform(size=sides.shape) ** 0.5))
    corners = (sides - lengths) * rng.choice([0, 1, 0.5, 0.137, 0.86], size=sides.shape)
    if not fractional:
        corners = np.floor(corners)
    return np.concatenate([corners, lengths, rng.integers(0, 2, (len(jpegs), 1))], axis=1)


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "gray"])
def test_segments_equal_the_whole_image(sampling: str, beyond: bool) -> None:
    whole = [jpeg for size in SIZES for jpeg in _all_intervals(size, sampling)] * EPOCHS
    indexed = [add_index(jpeg) for jpeg in whole]
    assert all(len(one) > len(other) for one, other in zip(indexed, whole, strict=True))
    boxes = _boxes(whole, np.random.default_rng(len(whole) + beyond), fractional=beyond)
    for size in (8, 48):
        expected, status = _decode(whole, boxes, size, beyond)
        assert status == [0] * len(whole)
        images, status = _decode(indexed, boxes, size, beyond)
        assert status == [0] * len(whole)
        assert np.array_equal(images, expected)


@pytest.mark.parametrize("train", [True, False])
def test_converted_files_are_read_like_those_without_an_index(
    train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversion, file and loader as a user has them; jpegtran chooses the intervals, where it is installed."""
    kinds = [_encode(size, sampling, 0) for size in SIZES for sampling in (*SAMPLINGS, "gray")]
    batches = {}
    for name in ("indexed", "plain"):
        if name == "plain":
            monkeypatch.setattr(jpegs, "add_index", lambda jpeg: jpeg)
        options = WriteOptions(workers=1, max_bad=0, jpegs="auto" if jpegs.find_jpegtran() is None else "keep")
        path = tmp_path / f"{name}.beton"
        write_beton(Files(*kinds), path, options, class_names=["a"], name="t", source="tests")
        assert [jpeg[6:14] == MAGIC for jpeg, _, _ in stored_jpegs(path)] == [name == "indexed"] * len(kinds)
        crop = CropSettings(scale=(0.05, 1.0)) if train else None
        loader = open_loader(path, crop=crop, micro_batch=len(kinds), image_size=48)
        batches[name] = [batch.images for epoch in range(3 if train else 1) for batch in loader.epoch(epoch)]
        loader.close()
    assert all(map(torch.equal, batches["indexed"], batches["plain"])) and len(batches["plain"]) == (3 if train else 1)


def _places(jpeg: bytes) -> list[tuple[int, int]]:
    """Return start and end of each segment, by a search for the markers."""
    header = read_header(jpeg)
    assert header is not None
    bounds = [header.scan]
    for place in range(header.scan, len(jpeg) - 1):
        if jpeg[place] == 0xFF and 0xD0 <= jpeg[place + 1] <= 0xD9:
            bounds += [place, place + 2]
    return list(zip(bounds[::2], bounds[1::2], strict=False))


def test_flipped_bits_are_noticed_where_they_are_decoded() -> None:
    """The box touches the segments of rows 1 to 3 and columns 1 and 2, of 8 rows and 4 columns."""
    jpeg = add_index(_encode((256, 128), "420", 4))
    places = _places(jpeg)
    assert len(places) == 8 * 4
    box = np.array([[20.0, 70, 40, 100, 0]])
    (expected,), _ = _decode([jpeg], box, 32, False)
    noticed = []
    for segment, (start, end) in enumerate(places):
        changed = bytearray(jpeg)
        changed[(start + end) // 2] ^= 1 << segment % 8
        (image,), status = _decode([bytes(changed)], box, 32, False, [zlib.adler32(jpeg)])
        noticed += [segment] if status == [jpeg_kernel.DAMAGED] else []
        assert status == [jpeg_kernel.DAMAGED] or np.array_equal(image, expected)
    assert noticed == [4 * row + column for row in (1, 2, 3) for column in (1, 2)]


def test_damaged_segments_are_named_with_their_place() -> None:
    """8 rows and 4 columns of segments, each 64 pixels wide and 16 high."""
    jpeg = add_index(_encode((256, 128), "420", 4))
    for segment, (start, end) in enumerate(_places(jpeg)):
        changed = bytearray(jpeg)
        changed[(start + end) // 2] ^= 1
        left, top = segment % 4 * 64, segment // 4 * 16
        place = f"(columns {left} to {left + 63}, rows {top} to {top + 15})"
        assert describe_damage(bytes(changed)) == f"in segment {segment} of 32 {place}"
    for place in (40 + 6 * 32, jpeg.index(b"\xff\xc0") + 5):
        assert describe_damage(jpeg[:place] + b"\0" + jpeg[place + 1 :]) == "in its header"
    assert describe_damage(_encode((256, 128), "420", 4)[:-9]) == ""


def test_every_flipped_bit_of_the_header_is_noticed() -> None:
    jpeg = add_index(_encode((64, 48), "420", 4))
    start = _places(jpeg)[0][0]
    damaged = []
    for bit in range(8 * 6, 8 * start):
        changed = bytearray(jpeg)
        changed[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(changed))
    offsets = np.arange(len(damaged)) * len(jpeg)
    table = np.array([[offset, len(jpeg), 48, 64, 0] for offset in offsets])
    images, status = np.zeros((len(damaged), 8, 8, 3), np.uint8), np.zeros(len(damaged), np.int32)
    scratch = jpeg_kernel.make_scratch(table, 8, 2)
    boxes = np.tile([0.0, 0, 48, 64, 0], (len(damaged), 1))
    sums = np.full(len(damaged), zlib.adler32(jpeg))
    content = np.frombuffer(b"".join(damaged), np.uint8)
    jpeg_kernel.decode(content, table, sums, np.arange(len(damaged)), boxes, False, images, scratch, status)
    jpeg_kernel.free_scratch(scratch)
    assert (status == jpeg_kernel.DAMAGED).all()


def test_truncated_segments_are_damaged() -> None:
    jpeg = add_index(_encode((256, 128), "422", 2))
    box = np.array([[0.0, 0, 128, 256, 0]])
    start = _places(jpeg)[0][0]
    for length in (start, start + 1, (start + len(jpeg)) // 2, len(jpeg) - 3, len(jpeg) - 1):
        assert _decode([jpeg[:length]], box, 16, False, [-1])[1] == [jpeg_kernel.DAMAGED]


def test_exchanged_images_are_damaged() -> None:
    """Every part of the other JPEG is sound; only the table knows that it is the wrong one."""
    jpegs = [add_index(_encode((256, 128), "420", interval)) for interval in (2, 4)]
    box = np.tile([20.0, 70, 40, 100, 0], (2, 1))
    sums = [zlib.adler32(jpeg) for jpeg in jpegs]
    assert _decode(jpegs, box, 16, False, sums)[1] == [0, 0]
    assert _decode(jpegs, box, 16, False, sums[::-1])[1] == [jpeg_kernel.DAMAGED] * 2
