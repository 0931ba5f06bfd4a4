"""The JPEG kernel against Pillow's bicubic and float64 references."""

from __future__ import annotations

import io
import logging
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mrmae_ds.data.loaders._ffcv import import_ffcv
from tests.support.sample_data import photograph

import_ffcv()

from numba.core import event  # noqa: E402

from mrmae_ds.data.loaders import (  # noqa: E402
    augment_kernel,
    ffcv_decoder,  # noqa: F401, registers the listener
    jpeg_kernel,
    resize_kernel,
)

pytestmark = pytest.mark.timeout(240, method="thread")
Box = tuple[float, float, float, float, int]
# Reduced slightly and strongly, enlarged, thin, single-pixel, mirrored.
BOXES: list[tuple[Box, int]] = [
    ((0, 0, 301, 203, 0), 64),
    ((7, 30, 250, 101, 1), 224),
    ((100, 3, 19, 180, 0), 32),
    ((0, 0, 301, 203, 1), 2),
    ((299, 201, 1, 1, 0), 8),
    ((33, 33, 40, 41, 1), 160),
]


def _jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def _image() -> Image.Image:
    return photograph().crop((100, 50, 100 + 203, 50 + 301))


def _gray() -> Image.Image:
    """Return an image whose levels keep the filter's overshoot from being clipped, which Pillow does twice."""
    return ImageOps.grayscale(_image()).point(lambda value: 50 + 0.6 * value).convert("RGB")


def _binary() -> Image.Image:
    """Return a random image of 28 x 28 black and white pixels."""
    white = np.random.default_rng(0).random((28, 28)) > 0.5
    return Image.fromarray(white.astype(np.uint8) * 255).convert("RGB")


def _bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [H, W, 3] in float64 by torch, with antialiasing and without clipping."""
    planes = torch.from_numpy(pixels).double().permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _decode(
    jpegs: Sequence[bytes], boxes: Sequence[Box], size: int, beyond: bool = False, threads: int = 2
) -> tuple[np.ndarray, list[int]]:
    """Return images [B, S, S, 3] and their statuses; sizes are read by Pillow."""
    offsets = np.cumsum([0, *(len(jpeg) for jpeg in jpegs)])
    sides = [Image.open(io.BytesIO(jpeg)).size[::-1] for jpeg in jpegs]
    table = np.array([[offset, len(jpeg), *side, 0] for offset, jpeg, side in zip(offsets, jpegs, sides, strict=False)])
    sums = [zlib.adler32(jpeg) for jpeg in jpegs]
    return _decode_table(b"".join(jpegs), table, boxes, size, beyond, threads, sums)


def _decode_table(
    content: bytes,
    table: np.ndarray,
    boxes: Sequence[Box],
    size: int,
    beyond: bool = False,
    threads: int = 2,
    checksums: Sequence[int] | None = None,
) -> tuple[np.ndarray, list[int]]:
    images, status = np.zeros((len(table), size, size, 3), dtype=np.uint8), np.full(len(table), -1, dtype=np.int32)
    scratch = jpeg_kernel.make_scratch(table, size, threads)
    file, rows = np.frombuffer(content, dtype=np.uint8), np.arange(len(table))
    sums = np.array([-1] * len(table) if checksums is None else checksums)
    jpeg_kernel.decode(file, table, sums, rows, np.array(boxes, dtype=float), beyond, images, scratch, status)
    jpeg_kernel.free_scratch(scratch)
    return images, status.tolist()


def _pillow(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Crop, then resize; [S, S, 3]."""
    top, left, height, width, mirrored = (int(side) for side in box)
    part = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part).astype(int)


@pytest.mark.parametrize("box, size", BOXES)
def test_full_chroma_equals_float64_resizing(box: Box, size: int) -> None:
    """Compare with torch's antialiased bicubic of the decoded YCbCr and JFIF's formulas."""
    jpeg = _jpeg(_image(), quality=90, subsampling="4:4:4")
    (image,), status = _decode([jpeg], [box], size)
    assert status == [0]
    opened = Image.open(io.BytesIO(jpeg))
    opened.draft("YCbCr", opened.size)
    assert opened.mode == "YCbCr"
    top, left, height, width, mirrored = (int(side) for side in box)
    planes = torch.from_numpy(np.array(opened)).double().permute(2, 0, 1)[None]
    part = planes[:, :, top : top + height, left : left + width]
    y, cb, cr = torch.nn.functional.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]
    cb, cr = cb - 128, cr - 128
    expected = torch.stack([y + 1.402 * cr, y - 0.344136286 * cb - 0.714136286 * cr, y + 1.772 * cb], dim=-1)
    expected = expected.flip(1) if mirrored else expected
    difference = np.abs(image - expected.clamp(0, 255).numpy())
    assert difference.max() < 0.6  # half a level of rounding, and the weights' 14 bits


@pytest.mark.parametrize("box, size", BOXES)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_luma_equals_pillow(box: Box, size: int, subsampling: str) -> None:
    """Compare images without color. Pillow rounds twice, and the filter amplifies the first rounding."""
    jpeg = _jpeg(_gray(), quality=90, subsampling=subsampling)
    (image,), status = _decode([jpeg], [box], size)
    assert status == [0]
    assert np.abs(image - _pillow(Image.open(io.BytesIO(jpeg)).convert("RGB"), box, size)).max() <= 2


# Image, size, and the largest and the mean difference that docs/data.md gives.
EDGES = {
    "28 to 32": (_binary(), 32, 26, 2.71),
    "28 to 224": (_binary(), 224, 29, 2.66),
    "a photograph enlarged": (photograph().resize((64, 64)), 224, 13, 0.175),
    "a photograph reduced": (photograph(), 224, 5, 0.13),
    "a crop of 100 x 90": (photograph().crop((40, 30, 130, 130)), 224, 2, 0.19),
}


@pytest.mark.parametrize("image, size, most, mean", EDGES.values(), ids=EDGES)
def test_differs_from_pillow_where_its_horizontal_pass_is_clipped(
    image: Image.Image, size: int, most: int, mean: float
) -> None:
    """Compare raw pixels with one float64 bicubic, and Pillow's with two that are rounded and clipped."""
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    table, box = np.array([[0, pixels.size, height, width, 1]]), (0, 0, height, width, 0)
    (ours,), _ = _decode_table(pixels.tobytes(), table, [box], size)
    assert np.abs(ours - _bicubic(pixels, size, size).clip(0, 255)).max() < 0.6
    across = _bicubic(pixels, height, size)
    theirs = _pillow(image, box, size)
    assert np.abs(theirs - _bicubic(np.rint(across).clip(0, 255), size, size).clip(0, 255)).max() < 2
    difference = np.abs(ours - theirs)
    assert difference.max() == most and difference.mean() == pytest.approx(mean, abs=0.005)
    clipped = ((across < 0) | (across > 255)).any(axis=(0, 2))
    assert difference[:, ~clipped].max(initial=0) <= 2


@pytest.mark.parametrize("box, size", BOXES)
@pytest.mark.parametrize("subsampling", ["4:2:2", "4:2:0"])
def test_colors_differ_only_by_chroma_interpolation(box: Box, size: int, subsampling: str) -> None:
    jpeg = _jpeg(_image(), quality=90, subsampling=subsampling)
    (image,), _ = _decode([jpeg], [box], size)
    expected = _pillow(Image.open(io.BytesIO(jpeg)).convert("RGB"), box, size)
    assert np.abs(image - expected).mean() < 1
    luma = np.abs((image - expected) @ np.array([0.299, 0.587, 0.114]))
    # Luma differs where Pillow clips a color before it resizes.
    assert np.quantile(luma, 0.99) < 1.5
    other = (box[0], box[1], box[2], box[3], 1 - box[4])
    if box[3] > 1:
        assert np.abs(image - _pillow(Image.open(io.BytesIO(jpeg)).convert("RGB"), other, size)).mean() > 2


@pytest.mark.parametrize("size", [32, 96, 256])
def test_beyond_equals_resizing_before_cropping(size: int) -> None:
    """Resize to a height of 2 * size, and crop the center."""
    jpeg = _jpeg(_gray(), quality=90)
    width = 2 * size * 203 // 301
    left = (width - size) // 2
    box = (0.25 * 301, left * 203 / width, 0.5 * 301, size * 203 / width, 0)
    (image,), _ = _decode([jpeg], [box], size, beyond=True)
    whole = Image.open(io.BytesIO(jpeg)).resize((width, 2 * size), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, size // 2, left + size, size // 2 + size))).astype(int)
    assert np.abs(image - expected).max() <= 2
    (cropped_first,), _ = _decode([jpeg], [box], size)
    assert np.abs(cropped_first - expected).max() > 2


def test_flat_images_stay_flat() -> None:
    """The weights of each output sum to exactly 1, for any number of taps."""
    for color in ((255, 255, 255), (0, 0, 0), (200, 30, 90)):
        jpeg = _jpeg(Image.new("RGB", (3000, 17), color), quality=100, subsampling="4:4:4")
        decoded = np.asarray(Image.open(io.BytesIO(jpeg)))[0, 0].astype(int)
        for size in (1, 3, 31):
            images, _ = _decode([jpeg], [(0, 0, 17, 3000, 0)], size)
            assert np.abs(images[0] - decoded).max() <= 1
            assert len(np.unique(images[0].reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (3, 2), (15, 17), (16, 16)])
def test_enlarged_small_images_are_near_those_of_pillow(size: tuple[int, int]) -> None:
    jpeg = _jpeg(_gray().resize(size), quality=95)
    box = (0, 0, size[1], size[0], 0)
    (image,), status = _decode([jpeg], [box], 24)
    assert status == [0]
    assert np.abs(image - _pillow(Image.open(io.BytesIO(jpeg)), box, 24)).max() <= 2


def test_result_does_not_depend_on_threads_or_batch() -> None:
    sizes = [(203, 301), (20, 31), (400, 90), (64, 64), (301, 203)]
    jpegs = [_jpeg(photograph().resize(size), quality=90) for size in sizes]
    boxes = [(0.0, 0.0, float(height), float(width), place % 2) for place, (width, height) in enumerate(sizes)]
    alone = np.concatenate([_decode([jpeg], [box], 48, threads=1)[0] for jpeg, box in zip(jpegs, boxes, strict=True)])
    for threads in (1, 2, 3, 7):
        images, status = _decode(jpegs, boxes, 48, threads=threads)
        assert np.array_equal(images, alone) and status == [0] * 5


def test_anything_but_an_intact_jpeg_of_gray_or_ycbcr_is_damaged() -> None:
    """The other images of the batch are not affected."""
    sound = _jpeg(_image(), quality=90)
    half = len(sound) // 2
    cases = {
        "intact": sound,
        "cmyk": _jpeg(_image().convert("CMYK"), quality=90),
        "rgb": _jpeg(_image(), quality=90, keep_rgb=True),
        "truncated": sound[:half],
        "blank": sound[:half] + bytes(len(sound) - half),
        "no jpeg": b"\0" * 300,
        "png": _png(),
        "nothing": b"",
        "intact again": sound,
    }
    offsets = np.cumsum([0, *(len(jpeg) for jpeg in cases.values())])
    table = np.array([[offset, len(jpeg), 301, 203, 0] for offset, jpeg in zip(offsets, cases.values(), strict=False)])
    _, status = _decode_table(b"".join(cases.values()), table, [(0, 0, 301, 203, 0)] * len(cases), 16)
    expected = [0 if name.startswith("intact") else jpeg_kernel.DAMAGED for name in cases]
    assert dict(zip(cases, status, strict=True)) == dict(zip(cases, expected, strict=True))


def test_gray_jpeg_equals_its_rgb() -> None:
    gray = _gray()
    jpeg = _jpeg(ImageOps.grayscale(gray), quality=90)
    (image,), status = _decode([jpeg], [BOXES[1][0]], 64)
    assert status == [0] and (image == image[:, :, :1]).all()
    assert np.abs(image - _pillow(Image.open(io.BytesIO(jpeg)).convert("RGB"), BOXES[1][0], 64)).max() <= 2


def _png() -> bytes:
    stream = io.BytesIO()
    _image().save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("side", [(300, 203), (302, 203), (301, 202), (301, 204), (20, 20), (203, 301)])
def test_jpeg_of_another_size_is_damaged(side: tuple[int, int]) -> None:
    jpeg = _jpeg(_image(), quality=90)
    _, status = _decode_table(jpeg, np.array([[0, len(jpeg), *side, 0]]), [(0, 0, 10, 10, 0)], 16)
    assert status == [jpeg_kernel.DAMAGED]


@pytest.mark.parametrize("more", [0, 1, 4095, 4096, 60_000])
def test_checksum_equals_zlib(more: int) -> None:
    """Vary the length by bytes after the end of the JPEG, which the decoder ignores."""
    jpeg = _jpeg(_image().resize((20, 30)), quality=90) + b"\xff" * more
    table, box = np.array([[0, len(jpeg), 30, 20, 0]]), [(0, 0, 30, 20, 0)]
    right = zlib.adler32(jpeg)
    for checksum, status in ((right, 0), (-1, 0), (right ^ 1, jpeg_kernel.DAMAGED), (0, jpeg_kernel.DAMAGED)):
        assert _decode_table(jpeg, table, box, 8, checksums=[checksum])[1] == [status]
    if more:
        changed = jpeg[:-1] + b"\xfe"
        assert _decode_table(changed, table, box, 8, checksums=[right])[1] == [jpeg_kernel.DAMAGED]


def test_compilation_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    """Numba triggers this event for a function that it does not find compiled on disk."""
    with caplog.at_level(logging.INFO):
        for dispatcher in (jpeg_kernel.decode, augment_kernel.augment, resize_kernel._cubic):
            with event.trigger_event("numba:compile", data={"dispatcher": dispatcher}):
                pass
    decoder, augmentation = caplog.messages
    assert decoder.startswith("compiling the JPEG decoder, once")
    # One kernel does both, and a pre-training may have color jitter alone.
    assert augmentation.startswith("compiling RandAugment and color jitter, once")
