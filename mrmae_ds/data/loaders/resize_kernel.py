"""Resizing part of the JPEG kernel: Pillow's antialiased bicubic filter in integers, the same on every machine.

Overshoot at edges is kept between the passes, as in exact arithmetic. Pillow clips it there, so that its pixels differ,
most in black-and-white images (docs/data.md, "How the data is read").

The sums of both passes are ``vector_kernel``'s, of pairs of taps. A pair starts at an even row or column, so that each
is made once; an output that starts at an odd one has a first weight of 0.

Shapes: S output size, K taps of the filter, L ``vector_kernel.LANES``; "rounded" means up to a multiple of L.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from mrmae_ds.data.loaders.vector_kernel import (
    LANES,
    SIDE,
    filter_to_int16,
    filter_to_int32,
    store_pixels,
    transpose,
)

_ONE = 1 << 14  # a weight of 1
_BETWEEN = 6  # fractional bits between the passes
_HALF = 1 << 13
_MIDDLE = 128 << _BETWEEN  # chroma of gray


@njit(nogil=True)
def _cubic(x):  # type: ignore[no-untyped-def]
    """Evaluate Keys's cubic with a = -0.5, Pillow's BICUBIC; without branches, so that the compiler vectorizes it."""
    x = abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return near if x < 1 else (far if x < 2 else 0.0)


@njit(nogil=True)
def _weigh(begin, length, low, high, firsts, weights, sums):  # type: ignore[no-untyped-def]
    """Compute the filter along one axis: Pillow's ``precompute_coeffs``, in integers whose sum is exactly 1.

    Args:
        begin: start of the box in samples of the plane, float.
        length: of the box in samples of the plane, float.
        low: first sample that may be used.
        high: end of the samples that may be used.
        firsts: int64 [S], written: the first sample of each output.
        weights: int32 [K // 2, S], written: pairs of the weights from the even sample at or before it.
        sums: float64 [K + 3, S], overwritten.

    Returns:
        The number of taps in use; the first sample in use and the one after the last.
    """
    size = firsts.size
    scale = length / size
    spread = max(scale, 1.0)
    most, used, unused = 1, high, low
    centers, counts, total = sums[0], sums[1], sums[2]
    for place in range(size):
        center = begin + (place + 0.5) * scale
        first = max(low, math.floor(center - 2 * spread + 0.5))
        count = min(high, math.floor(center + 2 * spread + 0.5)) - first
        firsts[place], centers[place], counts[place], total[place] = first, center, count, 0.0
        most, used, unused = max(most, count), min(used, first), max(unused, first + count)
    # Tap by tap, all outputs at once: twice as fast as output by output.
    for tap in range(most):
        running = sums[3 + tap]
        for place in range(size):
            value = _cubic((firsts[place] + tap + 0.5 - centers[place]) / spread)
            total[place] += value if tap < counts[place] else 0.0
            running[place] = total[place]
    given = counts
    given[:] = 0.0
    for tap in range(most):
        running = sums[3 + tap]
        for place in range(size):
            upto = np.rint(_ONE * running[place] / total[place])
            running[place], given[place] = upto - given[place], upto
    total[:], sums[3 + most], sums[4 + most] = 0.0, 0.0, 0.0  # the taps before the first and after the last
    for pair in range((most + 2) // 2):
        before, here, after = sums[2 + 2 * pair], sums[3 + 2 * pair], sums[4 + 2 * pair]
        for place in range(size):
            odd = firsts[place] % 2 != 0
            one, other = np.int32(before[place] if odd else here[place]), np.int32(here[place] if odd else after[place])
            weights[pair, place] = np.int32(np.int32(one & 0xFFFF) | np.int32(other << 16))
    return most, used, unused


@njit(nogil=True)
def _count_pairs(first, taps):  # type: ignore[no-untyped-def]
    """Return the number of pairs of an output's taps."""
    return (first % 2 + taps + 1) // 2


@njit(nogil=True)
def _pair_rows(plane, top, bottom, left, right, step, pairs):  # type: ignore[no-untyped-def]
    """Make pairs of a plane's rows.

    Args:
        plane: uint8 [height, width].
        top: first row, even.
        bottom: end of the rows.
        left: first column.
        right: end of the columns.
        step: elements from one pair of rows to the next.
        pairs: int32 [...], written.
    """
    last = plane.shape[0] - 1  # a sample with a weight of 0 may be any
    for row in range(top, bottom, 2):
        above, below = plane[row, left:right], plane[min(row + 1, last), left:right]
        target = pairs[(row - top) // 2 * step :][: right - left]
        for x in range(target.size):
            target[x] = np.int32(above[x]) | np.int32(np.int32(below[x]) << 16)


@njit(nogil=True)
def _reduce_rows(plane, firsts, weights, taps, used, pairs, rows, columns):  # type: ignore[no-untyped-def]
    """Filter down a plane, the first pass, and transpose the result.

    Args:
        plane: uint8 [height, width].
        firsts: int64 [S], first row of each output.
        weights: int32 [K // 2, S].
        taps: number of taps in use.
        used: top, left, bottom and right of the samples in use; top and left even.
        pairs: int32 [...], overwritten.
        rows: int16 [SIDE, columns rounded], overwritten.
        columns: int32 [pairs of columns rounded, S rounded], written.
    """
    size, (top, left, bottom, right) = firsts.size, used
    count = right - left
    step = count + -count % LANES
    _pair_rows(plane, top, bottom, left, right, step, pairs)
    source, weight, result, target = _address(pairs), _address(weights), _address(rows), _address(columns)
    half, shift = np.int32(1 << (13 - _BETWEEN)), np.int32(14 - _BETWEEN)
    for start in range(0, size, SIDE):
        for place in range(start, min(start + SIDE, size)):
            first = firsts[place]
            filter_to_int16(
                source + np.uint64(4 * step * ((first - top) // 2)), step, weight + np.uint64(4 * place), size,
                _count_pairs(first, taps), result + np.uint64(2 * rows.shape[1] * (place - start)), count, half, shift,
            )  # fmt: skip
        transpose(result, rows.shape[1] // 2, target + np.uint64(4 * start), columns.shape[1], (count + 1) // 2)


@njit(nogil=True)
def _address(array):  # type: ignore[no-untyped-def]
    """Return the address of a contiguous array."""
    return np.uint64(array.ctypes.data)


@njit(nogil=True)
def _byte(value):  # type: ignore[no-untyped-def]
    """Round away 20 fractional bits."""
    return min(max(np.int32(np.int32(value + np.int32(1 << 19)) >> 20), np.int32(0)), np.int32(255))


@njit(nogil=True)
def _pack(lines, raw, pixels):  # type: ignore[no-untyped-def]
    """Round RGB, or convert JFIF's YCbCr with weights of 14 bits.

    Args:
        lines: int32 [3, S], with ``_BETWEEN`` fractional bits.
        raw: True if they are RGB.
        pixels: int32 [S], written: R, G and B, from the lowest byte.
    """
    for y in range(pixels.size):
        one, two, three = lines[0, y], lines[1, y], lines[2, y]
        gray, cb, cr = np.int32(one << 14), np.int32(two - _MIDDLE), np.int32(three - _MIDDLE)
        if raw:
            r, g, b = _byte(gray), _byte(np.int32(two << 14)), _byte(np.int32(three << 14))
        else:
            r = _byte(np.int32(gray + np.int32(np.int32(22970) * cr)))
            g = _byte(np.int32(gray - np.int32(np.int32(5638) * cb) - np.int32(np.int32(11700) * cr)))
            b = _byte(np.int32(gray + np.int32(np.int32(29032) * cb)))
        pixels[y] = r | np.int32(g << 8) | np.int32(b << 16)


@njit(nogil=True)
def _store(pixels, columns, left, image):  # type: ignore[no-untyped-def]
    """Store up to SIDE columns of pixels, int32 [SIDE, S rounded], in an image from column ``left`` on."""
    size, done = image.shape[0], 0
    if columns == SIDE:
        done = size - size % SIDE
        store_pixels(_address(pixels), pixels.shape[1], _address(image) + np.uint64(3 * left), 3 * size, done)
    for y in range(done, size):
        for column in range(columns):
            for channel in range(3):
                image[y, left + column, channel] = (pixels[column, y] >> (8 * channel)) & 255


@njit(nogil=True)
def weigh_axes(sides, steps, box, beyond, scratch, thread):  # type: ignore[no-untyped-def]
    """Compute the filters of luma and chroma along both axes; see ``jpeg_kernel.Scratch``.

    Args:
        sides: height and width of the image.
        steps: height and width of a chroma sample in luma samples.
        box: float64 [5]; see ``jpeg_kernel.decode``.
        beyond: see ``jpeg_kernel.decode``.
        scratch: memory of the threads.
        thread: index of this thread.

    Returns:
        Results of ``_weigh``, int64 [4, 3].
    """
    used = np.empty((4, 3), np.int64)
    for index in range(4):
        axis, step = index % 2, steps[index % 2] if index >= 2 else 1
        begin, length, side = box[axis], box[axis + 2], float(sides[axis])
        low, high = (0.0, side) if beyond else (begin, begin + length)
        used[index] = _weigh(
            begin / step, length / step, int(low) // step, math.ceil(high / step),
            scratch.firsts[thread, index], scratch.weights[thread, index], scratch.sums[thread],
        )  # fmt: skip
    return used


@njit(nogil=True)
def resize(planes, used, raw, mirrored, image, scratch, thread):  # type: ignore[no-untyped-def]
    """Resize a box of three planes and convert it to RGB.

    Args:
        planes: luma, Cb, Cr, or R, G, B if ``raw``, uint8 [height, width], padded to whole chroma samples.
        used: int64 [4, 3]; see ``weigh_axes``.
        raw: True for planes that are RGB already.
        mirrored: True to mirror the image.
        image: uint8 [S, S, 3], written.
        scratch: memory of the threads.
        thread: index of this thread.
    """
    firsts, weights = scratch.firsts[thread], scratch.weights[thread]
    columns, lines, pixels = scratch.columns[thread], scratch.lines[thread], scratch.pixels[thread]
    size, width = image.shape[0], columns.shape[2]
    half, shift = np.int32(_HALF), np.int32(14)
    for plane in range(3):
        down, across = (0, 1) if plane == 0 else (2, 3)
        region = used[down, 1] // 2 * 2, used[across, 1] // 2 * 2, used[down, 2], used[across, 2]
        _reduce_rows(
            planes[plane], firsts[down], weights[down], used[down, 0], region, scratch.pairs[thread],
            scratch.rows[thread], columns[plane],
        )  # fmt: skip
    for x in range(size):
        place = size - 1 - x if mirrored else x
        for plane in range(3):
            across = 1 if plane == 0 else 3
            first = firsts[across, place]
            filter_to_int32(
                _address(columns[plane]) + np.uint64(4 * width * (first // 2 - used[across, 1] // 2)), width,
                _address(weights[across]) + np.uint64(4 * place), size, _count_pairs(first, used[across, 0]),
                _address(lines[plane]), size, half, shift,
            )  # fmt: skip
        _pack(lines, raw, pixels[x % SIDE, :size])
        if x % SIDE == SIDE - 1 or x == size - 1:
            _store(pixels, x % SIDE + 1, x // SIDE * SIDE, image)
