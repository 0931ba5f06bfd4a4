"""Numba kernel of RandAugment: Pillow's operations on uint8 images, bit for bit, without Python's lock.

Pillow computes in float32 (blends) and float64 (geometry). The same operations in the same order give the same pixels,
so nothing may be reordered or fused: no ``fastmath``. Explicit 32-bit types, and indices that the compiler sees to be
contiguous, are what makes it vectorize the loops.

Shapes: B samples, S image size, L operations of a sample, T threads. A row of an image is 3 S interleaved colors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange
from numpy import float32, float64, int32, uint8, uint32

from mrmae_ds.data.loaders import augment as augment_settings
from mrmae_ds.data.loaders import vector_kernel
from mrmae_ds.data.loaders.augment import Change
from mrmae_ds.data.loaders.vector_kernel import checksum_of_files, take_next
from mrmae_ds.data.types import BoolArray, FloatArray, ImageArray

# Of plain integers, which the compiler knows.
_AUTO_CONTRAST, _EQUALIZE, _INVERT = int(Change.AUTO_CONTRAST), int(Change.EQUALIZE), int(Change.INVERT)
_POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = int(Change.POSTERIZE), int(Change.SOLARIZE), int(Change.SOLARIZE_ADD)
_COLOR, _CONTRAST, _SHARPNESS = int(Change.COLOR), int(Change.CONTRAST), int(Change.SHARPNESS)
_NONE, _AFFINE = int(Change.NONE), int(Change.AFFINE)
_BORDER = 2  # pixels that bicubic interpolation reads beyond the image: its edge, repeated


class AugmentScratch(NamedTuple):
    """Memory of T threads; no content outlives an operation.

    Attributes:
        taken: int64 [1], number of images of the batch that a thread has taken.
        counts: int64 [T, 3, 256], histograms.
        tables: uint8 [T, 3, 256], new values of each color.
        copy: uint8 [T, S, 3 S], an image.
        packed: int32 [T, (S + 4) (S + 4)], an image with its edges repeated twice, a pixel in a number.
        places: int32 [T, S], the first pixel in ``packed`` of each in an output row.
        inside: bool [T, S], False for the pixels of an output row that lie outside the image.
        fractions: float64 [T, 2, S], positions between two pixels, across and down.
        taps: int32 [T, 4, S], pixels between which is interpolated.
        lines: float64 [T, 5, 3, S], colors of four rows after interpolation across, and of the output row.
    """

    taken: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    tables: ImageArray
    copy: ImageArray
    packed: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    inside: BoolArray
    fractions: FloatArray
    taps: npt.NDArray[np.int32]
    lines: FloatArray


def make_scratch(size: int, threads: int) -> AugmentScratch:
    """Allocate the memory of ``threads`` threads for images of ``size`` pixels."""
    return AugmentScratch(
        taken=np.zeros(1, dtype=np.int64),
        counts=np.zeros((threads, 3, 256), dtype=np.int64),
        tables=np.zeros((threads, 3, 256), dtype=np.uint8),
        copy=np.zeros((threads, size, 3 * size), dtype=np.uint8),
        packed=np.zeros((threads, (size + 2 * _BORDER) ** 2), dtype=np.int32),
        places=np.zeros((threads, size), dtype=np.int32),
        inside=np.zeros((threads, size), dtype=np.bool_),
        fractions=np.zeros((threads, 2, size)),
        taps=np.zeros((threads, 4, size), dtype=np.int32),
        lines=np.zeros((threads, 5, 3, size)),
    )


@njit(nogil=True)
def _blend(one, other, factor):  # type: ignore[no-untyped-def]
    """Apply Pillow's ``blend`` to two values, int32, by a float32 factor: rounded down and clipped."""
    value = float32(one) + factor * float32(int32(other - one))
    return uint8(int32(min(max(value, float32(0)), float32(255))))


@njit(nogil=True)
def _gray(red, green, blue):  # type: ignore[no-untyped-def]
    """Return Pillow's luma, int32, of three uint8."""
    weighted = int32(int32(red) * int32(19595) + int32(green) * int32(38470) + int32(blue) * int32(7471))
    return int32(int32(weighted + int32(1 << 15)) >> int32(16))


@njit(nogil=True)
def _count(image, counts):  # type: ignore[no-untyped-def]
    """Count the values of each color: ``counts`` int64 [3, 256], written."""
    counts[:] = 0
    red, green, blue = counts[0], counts[1], counts[2]
    for y in range(image.shape[0]):
        row = image[y]
        for x in range(row.size // 3):
            red[row[3 * x]] += 1
            green[row[3 * x + 1]] += 1
            blue[row[3 * x + 2]] += 1


@njit(nogil=True)
def _stretch(counts, table):  # type: ignore[no-untyped-def]
    """Write a color's table of ``ImageOps.autocontrast``."""
    low, high = 0, 255
    while low < 255 and counts[low] == 0:
        low += 1
    while high > 0 and counts[high] == 0:
        high -= 1
    for value in range(256):
        if high > low:
            scale = 255.0 / (high - low)
            table[value] = min(max(int(value * scale + -low * scale), 0), 255)
        else:
            table[value] = value


@njit(nogil=True)
def _equalize(counts, table):  # type: ignore[no-untyped-def]
    """Write a color's table of ``ImageOps.equalize``."""
    last = 255
    while last > 0 and counts[last] == 0:
        last -= 1
    step = (counts.sum() - counts[last]) // 255
    total = step // 2
    for value in range(256):
        table[value] = min(total // step, 255) if step else value
        total += counts[value]


@njit(nogil=True)
def _mean_gray(image):  # type: ignore[no-untyped-def]
    """Return the rounded mean of the luma, int32."""
    total = 0
    for y in range(image.shape[0]):
        row, of_row = image[y], int32(0)
        for x in range(row.size // 3):
            of_row = int32(of_row + _gray(row[3 * x], row[3 * x + 1], row[3 * x + 2]))
        total += of_row
    return int32(total / (image.size // 3) + 0.5)


@njit(nogil=True)
def _change_values(code, argument, image, counts, tables):  # type: ignore[no-untyped-def]
    """Apply an operation that changes each value for itself, by a table for each color."""
    if code in (_AUTO_CONTRAST, _EQUALIZE):
        _count(image, counts)
        for color in range(3):
            if code == _EQUALIZE:
                _equalize(counts[color], tables[color])
            else:
                _stretch(counts[color], tables[color])
    else:
        mean = _mean_gray(image) if code == _CONTRAST else int32(0)  # brightness blends with black
        factor, whole = float32(argument), int(argument)
        for value in range(256):
            if code == _INVERT:
                new = 255 - value
            elif code == _POSTERIZE:
                new = value & ~((1 << (8 - whole)) - 1)
            elif code == _SOLARIZE:
                new = value if value < whole else 255 - value
            elif code == _SOLARIZE_ADD:
                new = min(255, value + whole) if value < 128 else value
            else:
                new = int(_blend(mean, int32(value), factor))
            tables[:, value] = new
    red, green, blue = tables[0], tables[1], tables[2]
    for y in range(image.shape[0]):
        row = image[y]
        for x in range(row.size // 3):
            row[3 * x], row[3 * x + 1] = red[row[3 * x]], green[row[3 * x + 1]]
            row[3 * x + 2] = blue[row[3 * x + 2]]


@njit(nogil=True)
def _change_color(image, factor):  # type: ignore[no-untyped-def]
    """Apply ``ImageEnhance.Color``: blend with the gray image."""
    for y in range(image.shape[0]):
        row = image[y]
        for x in range(row.size // 3):
            red, green, blue = row[3 * x], row[3 * x + 1], row[3 * x + 2]
            gray = _gray(red, green, blue)
            row[3 * x] = _blend(gray, int32(red), factor)
            row[3 * x + 1] = _blend(gray, int32(green), factor)
            row[3 * x + 2] = _blend(gray, int32(blue), factor)


@njit(nogil=True)
def _sharpen(image, factor, copy):  # type: ignore[no-untyped-def]
    """Apply ``ImageEnhance.Sharpness``: blend with the smoothed image, which keeps the outermost pixels."""
    for y in range(image.shape[0]):  # whole arrays compile for seconds
        for x in range(image.shape[1]):
            copy[y, x] = image[y, x]
    for y in range(1, image.shape[0] - 1):
        above, here, below, row = copy[y - 1], copy[y], copy[y + 1], image[y]
        for x in range(row.size - 6):
            total = int32(above[x]) + int32(above[x + 3]) + int32(above[x + 6]) + int32(here[x]) + int32(here[x + 6])
            total += int32(below[x]) + int32(below[x + 3]) + int32(below[x + 6])
            own = int32(here[x + 3])
            # Divided by 13, the sum of the weights, and rounded; 20165 / 2**19 is 1 / 26 for all of these sums.
            smooth = int32(int32((2 * (total + 5 * own) + 13) * 20165) >> int32(19))
            row[x + 3] = _blend(smooth, own, factor)


@njit(nogil=True)
def _pack(image, packed):  # type: ignore[no-untyped-def]
    """Copy an image to ``packed``."""
    size = image.shape[0]
    side = size + 2 * _BORDER
    for y in range(side):
        colors, row = image[min(max(y - _BORDER, 0), size - 1)], packed[y * side : (y + 1) * side]
        inner = row[_BORDER : _BORDER + size]
        for x in range(size):
            red, green, blue = int32(colors[3 * x]), int32(colors[3 * x + 1]), int32(colors[3 * x + 2])
            inner[x] = int32(red | int32(green << int32(8)) | int32(blue << int32(16)))
        row[:_BORDER], row[side - _BORDER :] = inner[0], inner[size - 1]


@njit(nogil=True)
def _locate(y, size, matrix, places, inside, across, down):  # type: ignore[no-untyped-def]
    """Write the positions of an output row in the image; see ``AugmentScratch``."""
    side, end, middle = int32(size + 2 * _BORDER), float64(size), y + 0.5
    a, b, c, d, e, f = matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], matrix[5]
    for x in range(size):
        left, top = a * (x + 0.5) + b * middle + c, d * (x + 0.5) + e * middle + f
        valid = (left >= 0.0) & (left < end) & (top >= 0.0) & (top < end)
        left, top = left - 0.5 if valid else 0.0, top - 0.5 if valid else 0.0
        column, row = np.floor(left), np.floor(top)
        across[x], down[x], inside[x] = left - column, top - row, valid
        first = int32(_BORDER - 1)
        places[x] = int32(int32(int32(int32(row) + first) * side) + int32(int32(column) + first))


@njit(nogil=True)
def _cubic(one, two, three, four, d):  # type: ignore[no-untyped-def]
    """Interpolate between the second and the third of four values, float64, as Pillow does."""
    slope, square, cube = three - one, 2.0 * (one - two) + three - four, two - one - three + four
    return two + d * (slope + d * (square + d * cube))


@njit(nogil=True)
def _interpolate(packed, places, start, step, fractions, taps, line):  # type: ignore[no-untyped-def]
    """Write ``line`` [3, S], between four pixels ``step`` apart, of which the first is ``start`` after ``places``."""
    one, two, three, four = taps[0], taps[1], taps[2], taps[3]
    for x in range(places.size):
        place = uint32(places[x] + start)
        one[x], two[x] = packed[place], packed[uint32(place + step)]
        three[x], four[x] = packed[uint32(place + 2 * step)], packed[uint32(place + 3 * step)]
    for color in range(3):
        output, shift, byte = line[color], int32(8 * color), int32(255)
        for x in range(places.size):
            p, q = int32((one[x] >> shift) & byte), int32((two[x] >> shift) & byte)
            r, s = int32((three[x] >> shift) & byte), int32((four[x] >> shift) & byte)
            # The coefficients of ``_cubic`` are exact in integers.
            slope, square, cube = int32(r - p), int32(2 * (p - q) + r - s), int32(q - p - r + s)
            d = fractions[x]
            output[x] = float64(q) + d * (float64(slope) + d * (float64(square) + d * float64(cube)))


@njit(nogil=True)
def _store(line, inside, filling, row):  # type: ignore[no-untyped-def]
    """Write an output row, rounded down, clipped, and filled outside the image."""
    red, green, blue = line[0], line[1], line[2]
    r, g, b = filling[0], filling[1], filling[2]
    for x in range(inside.size):
        valid = inside[x]
        row[3 * x] = uint8(int32(min(max(red[x], 0.0), 255.0))) if valid else r
        row[3 * x + 1] = uint8(int32(min(max(green[x], 0.0), 255.0))) if valid else g
        row[3 * x + 2] = uint8(int32(min(max(blue[x], 0.0), 255.0))) if valid else b


@njit(nogil=True)
def _transform(image, matrix, filling, scratch, thread):  # type: ignore[no-untyped-def]
    """Apply ``Image.transform`` by a matrix, bicubic."""
    packed, places, inside = scratch.packed[thread], scratch.places[thread], scratch.inside[thread]
    across, down = scratch.fractions[thread, 0], scratch.fractions[thread, 1]
    taps, lines, line = scratch.taps[thread], scratch.lines[thread], scratch.lines[thread, 4]
    _pack(image, packed)
    size = image.shape[0]
    side, one = uint32(size + 2 * _BORDER), uint32(1)
    # Where all pixels lie on rows (or columns), interpolation between these returns the pixel itself.
    level = matrix[3] == 0 and matrix[4] == 1 and matrix[5] == 0
    upright = matrix[0] == 1 and matrix[1] == 0 and matrix[2] == 0
    for y in range(size):
        _locate(y, size, matrix, places, inside, across, down)
        if level:
            _interpolate(packed, places, int32(side), one, across, taps, line)
        elif upright:
            _interpolate(packed, places, int32(1), side, down, taps, line)
        else:
            for near in range(4):
                _interpolate(packed, places, int32(near * side), one, across, taps, lines[near])
            for color in range(3):
                p, q, r, s = lines[0, color], lines[1, color], lines[2, color], lines[3, color]
                for x in range(size):
                    line[color, x] = _cubic(p[x], q[x], r[x], s[x], down[x])
        _store(line, inside, filling, image[y])


def _compile(sources: int) -> Callable[..., None]:
    """Return ``augment``, compiled at its first call; ``sources``: ``checksum_of_files`` of what it calls."""

    @njit(parallel=True, nogil=True, cache=True)
    def augment(images, codes, arguments, filling, scratch):  # type: ignore[no-untyped-def]
        """Apply operations to images in place, on T threads.

        Args:
            images: uint8 [B, S, 3 S].
            codes: int64 [B, L], a ``Change`` each.
            arguments: float64 [B, L, 6], the matrix of an affine change, or one number.
            filling: uint8 [3], the color outside the image.
            scratch: memory of the threads.
        """
        _ = sources
        scratch.taken[0] = 0
        counter = np.uint64(scratch.taken.ctypes.data)
        for thread in prange(scratch.places.shape[0]):
            while True:
                b = take_next(counter)
                if b >= images.shape[0]:
                    break
                for layer in range(codes.shape[1]):
                    code, argument = codes[b, layer], arguments[b, layer]
                    if code == _AFFINE:
                        _transform(images[b], argument, filling, scratch, thread)
                    elif code == _SHARPNESS:
                        _sharpen(images[b], float32(argument[0]), scratch.copy[thread])
                    elif code == _COLOR:
                        _change_color(images[b], float32(argument[0]))
                    elif code != _NONE:
                        _change_values(code, argument[0], images[b], scratch.counts[thread], scratch.tables[thread])

    return augment


augment = _compile(checksum_of_files(augment_settings, vector_kernel))
