"""Resizing part of the JPEG kernel: Pillow's antialiased bicubic in integers, the same on every machine.

Shapes: S output size, K taps of the filter.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

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
def _weigh(begin, length, low, high, mirrored, firsts, weights, sums):  # type: ignore[no-untyped-def]
    """Compute the filter along one axis: Pillow's ``precompute_coeffs``, in integers whose sum is exactly 1.

    Args:
        begin: start of the box in samples of the plane, float.
        length: of the box in samples of the plane, float.
        low: first sample that may be used.
        high: end of the samples that may be used.
        mirrored: True puts the last output first.
        firsts: int64 [S], written: the first sample of each output.
        weights: int16 [S, K], written: the weight of each sample.
        sums: float64 [K + 3, S], overwritten.

    Returns:
        The number of taps in use, even; the first sample in use and the one after the last.
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
    for place in range(size):
        output = weights[size - 1 - place if mirrored else place]
        for tap in range(output.size):
            output[tap] = np.int16(np.int32(sums[3 + tap, place])) if tap < most else 0
    if mirrored:
        for place in range(size // 2):
            firsts[place], firsts[size - 1 - place] = firsts[size - 1 - place], firsts[place]
    return most + most % 2, used, unused


@njit(nogil=True)
def _filter_rows(plane, first, weights, taps, left, right, sums):  # type: ignore[no-untyped-def]
    """Filter down one output row of the first pass: ``sums`` int32 [columns], written; see ``_reduce_rows``."""
    last = plane.shape[0] - 1  # a sample with a weight of 0 may be any
    sums[:] = 1 << (13 - _BETWEEN)
    for tap in range(0, taps, 2):
        # Typed, so that the compiler vectorizes 32-bit numbers; two taps at a time are the fastest.
        one, other = np.int32(weights[tap]), np.int32(weights[tap + 1])
        above, below = plane[min(first + tap, last), left:right], plane[min(first + tap + 1, last), left:right]
        for x in range(sums.size):
            sums[x] = np.int32(sums[x] + np.int32(one * np.int32(above[x])) + np.int32(other * np.int32(below[x])))


@njit(nogil=True)
def _reduce_rows(plane, firsts, weights, taps, left, right, rows, reduced):  # type: ignore[no-untyped-def]
    """Filter down the columns ``left`` to ``right`` of a plane, the first pass.

    Args:
        plane: uint8 [height, width].
        firsts: int64 [S], first row of each output.
        weights: int16 [S, K].
        taps: number of taps in use.
        left: first column.
        right: end of the columns.
        rows: int32 [4, largest side], overwritten.
        reduced: int16 [columns, S rounded up to a multiple of 4], written: [column, output row].
    """
    count = right - left
    packed = reduced.view(np.int64)
    for start in range(0, firsts.size, 4):
        for place in range(4):
            output = min(start + place, firsts.size - 1)
            _filter_rows(plane, firsts[output], weights[output], taps, left, right, rows[place, :count])
        one, two, three, four = rows[0, :count], rows[1, :count], rows[2, :count], rows[3, :count]
        shift = 14 - _BETWEEN
        # Four rows at a time are one store for each column: the columns are far apart in memory.
        for x in range(count):
            low = np.uint64(np.uint16(one[x] >> shift)) | (np.uint64(np.uint16(two[x] >> shift)) << np.uint64(16))
            high = np.uint64(np.uint16(three[x] >> shift)) | (np.uint64(np.uint16(four[x] >> shift)) << np.uint64(16))
            packed[x, start // 4] = np.int64(low | (high << np.uint64(32)))


@njit(nogil=True)
def _reduce_column(reduced, first, weights, taps, column):  # type: ignore[no-untyped-def]
    """Filter one output column, the second pass: ``column`` int32 [S], written, with ``_BETWEEN`` fractional bits."""
    column[:] = _HALF
    for tap in range(0, taps, 2):
        one, other = np.int32(weights[tap]), np.int32(weights[tap + 1])
        left, right = reduced[first + tap], reduced[first + tap + 1]
        for y in range(column.size):
            column[y] = np.int32(column[y] + np.int32(one * np.int32(left[y])) + np.int32(other * np.int32(right[y])))
    for y in range(column.size):
        column[y] >>= 14


@njit(nogil=True)
def _byte(value):  # type: ignore[no-untyped-def]
    """Round away 20 fractional bits."""
    return np.uint8(min(max(np.int32(np.int32(value + np.int32(1 << 19)) >> 20), np.int32(0)), np.int32(255)))


@njit(nogil=True)
def _to_rgb(columns, pixels):  # type: ignore[no-untyped-def]
    """Convert JFIF's YCbCr [3, S] to RGB [3, S], with weights of 14 bits."""
    luma, blue, red = columns[0], columns[1], columns[2]
    r, g, b = pixels[0], pixels[1], pixels[2]
    for y in range(r.size):
        gray = np.int32(luma[y] << 14)
        cb, cr = np.int32(blue[y] - _MIDDLE), np.int32(red[y] - _MIDDLE)
        r[y] = _byte(np.int32(gray + np.int32(np.int32(22970) * cr)))
        g[y] = _byte(np.int32(gray - np.int32(np.int32(5638) * cb) - np.int32(np.int32(11700) * cr)))
        b[y] = _byte(np.int32(gray + np.int32(np.int32(29032) * cb)))


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
            begin / step, length / step, int(low) // step, math.ceil(high / step), axis == 1 and box[4] != 0,
            scratch.firsts[thread, index], scratch.weights[thread, index], scratch.sums[thread],
        )  # fmt: skip
    return used


@njit(nogil=True)
def resize(planes, used, raw, image, scratch, thread):  # type: ignore[no-untyped-def]
    """Resize a box of three planes and convert it to RGB.

    Args:
        planes: luma, Cb, Cr, or R, G, B if ``raw``, uint8 [height, width], padded to whole chroma samples.
        used: int64 [4, 3]; see ``weigh_axes``.
        raw: True for planes that are RGB already.
        image: uint8 [S, S, 3], written.
        scratch: memory of the threads.
        thread: index of this thread.
    """
    firsts, weights = scratch.firsts[thread], scratch.weights[thread]
    reduced, columns, pixels = scratch.reduced[thread], scratch.columns[thread], scratch.pixels[thread]
    for plane in range(3):
        down, across = (0, 1) if plane == 0 else (2, 3)
        _reduce_rows(
            planes[plane], firsts[down], weights[down], used[down, 0], used[across, 1], used[across, 2],
            scratch.rows[thread], reduced[plane],
        )  # fmt: skip
    for x in range(image.shape[1]):
        for plane in range(3):
            across = 1 if plane == 0 else 3
            first = firsts[across, x] - used[across, 1]
            _reduce_column(reduced[plane], first, weights[across, x], used[across, 0], columns[plane])
        if raw:
            for plane in range(3):
                for y in range(image.shape[0]):
                    pixels[plane, y] = _byte(np.int32(columns[plane, y] << 14))
        else:
            _to_rgb(columns, pixels)
        for y in range(image.shape[0]):
            for channel in range(3):
                image[y, x, channel] = pixels[channel, y]
