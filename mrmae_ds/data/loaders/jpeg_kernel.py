"""Numba kernel that decodes a JPEG and crops, resizes and mirrors it, without random state and without the GIL.

FFCV compiles its numba functions again for every ``Loader`` in every process and cannot cache them on disk, because the
addresses of its C functions are compiled in. Here the C functions (of libturbojpeg, which FFCV is linked with) are
referenced by symbol, so numba caches ``decode`` on disk, and one version serves training and evaluation, any number of
threads, any epoch and any seed. All that it calls must be in this file, because the cache detects changes of this file
only. Only ``ffcv_decoder`` uses it; ``data.backend: pillow`` in a recipe reads the same boxes without it.

libturbojpeg returns the planes of luma and chroma as they are stored, chroma at half the resolution. They are resized
first and converted to RGB afterwards, which equals the opposite order up to rounding and chroma's interpolation, and
processes a third of the numbers. Resizing is Pillow's antialiased bicubic, in integers: the same on every machine.

Shapes: B samples in a batch, S output size, N samples in the file, T threads, K taps of the filter.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import llvmlite.binding
import numpy as np
import numpy.typing as npt
from ffcv.libffcv import lib
from numba import njit, prange, types

from mrmae_ds.data.types import FloatArray, ImageArray, IntArray, UIntArray

for _name in ("tjDecompressHeader3", "tjDecompressToYUVPlanes"):
    llvmlite.binding.add_symbol(f"mrmae_{_name}", ctypes.cast(getattr(lib, _name), ctypes.c_void_p).value)

# Addresses are passed as integers: calling conventions treat them alike.
_address = types.uint64
_read_header = types.ExternalFunction(
    "mrmae_tjDecompressHeader3", types.int32(_address, _address, types.uint64, *[_address] * 4)
)
_read_planes = types.ExternalFunction(
    "mrmae_tjDecompressToYUVPlanes",
    types.int32(_address, _address, types.uint64, _address, types.int32, _address, types.int32, types.int32),
)

DAMAGED = 1  # see ``decode``
_YCBCR = 1  # libturbojpeg's number of the color space
# Width and height of a chroma sample in luma samples, by libturbojpeg's number of the subsampling: 4:4:4, 4:2:2,
# 4:2:0, gray (which has no chroma planes), 4:4:0, 4:1:1.
_WIDER, _HIGHER = (1, 2, 2, 0, 1, 4), (1, 1, 2, 0, 2, 1)
_PADDING = 4  # planes are padded to whole chroma samples
_ONE = 1 << 14  # a weight of 1
_BETWEEN = 6  # fractional bits between the passes
_HALF = 1 << 13
_MIDDLE = 128 << _BETWEEN  # chroma of gray
_PRIME, _BLOCK = 65521, 4096  # Adler-32's modulus; bytes whose sums fit into 32 bits


class Scratch(NamedTuple):
    """Memory of T threads; no content outlives an image.

    Attributes:
        handles: uint64 [T], libturbojpeg's decoders.
        header: int32 [T, 4], width, height, subsampling and color space.
        pointers: uint64 [T, 3], addresses of the planes.
        planes: uint8 [T, bytes of the largest image].
        rows: int32 [T, largest side or S].
        columns: int32 [T, 3, S].
        pixels: uint8 [T, 3, S].
        reduced: int16 [T, 3, largest side + K, S], planes after the first pass, transposed; the part beyond their end
            is multiplied by weights of 0.
        firsts: int64 [T, 4, S], first input sample of each output, for luma down, luma across, chroma down, chroma
            across.
        weights: int16 [T, 4, S, K], of the same axes.
        kernel: float64 [T, K].
    """

    handles: UIntArray
    header: npt.NDArray[np.int32]
    pointers: UIntArray
    planes: ImageArray
    rows: npt.NDArray[np.int32]
    columns: npt.NDArray[np.int32]
    pixels: ImageArray
    reduced: npt.NDArray[np.int16]
    firsts: IntArray
    weights: npt.NDArray[np.int16]
    kernel: FloatArray


def make_scratch(table: IntArray, size: int, threads: int) -> Scratch:
    """Allocate the memory of the threads.

    Args:
        table: of the images; see ``decode``.
        size: S, pixels.
        threads: T.

    Returns:
        The memory; ``free_scratch`` releases its decoders.
    """
    init = lib.tjInitDecompress
    init.restype = ctypes.c_void_p
    handles = [init() for _ in range(threads)]
    if None in handles:
        raise MemoryError("libturbojpeg cannot be initialized")
    side = int(table[:, 2:4].max())
    taps = 2 * (2 * -(-side // size) + 2)
    area = int(((table[:, 2] + _PADDING) * (table[:, 3] + _PADDING)).max())
    return Scratch(
        handles=np.array(handles, dtype=np.uint64),
        header=np.zeros((threads, 4), dtype=np.int32),
        pointers=np.zeros((threads, 3), dtype=np.uint64),
        planes=np.empty((threads, 3 * area), dtype=np.uint8),
        rows=np.empty((threads, side + _PADDING), dtype=np.int32),
        columns=np.empty((threads, 3, size), dtype=np.int32),
        pixels=np.empty((threads, 3, size), dtype=np.uint8),
        reduced=np.empty((threads, 3, side + taps, size), dtype=np.int16),
        firsts=np.zeros((threads, 4, size), dtype=np.int64),
        weights=np.zeros((threads, 4, size, taps), dtype=np.int16),
        kernel=np.zeros((threads, taps)),
    )


def free_scratch(scratch: Scratch) -> None:
    """Release libturbojpeg's decoders."""
    for handle in scratch.handles.tolist():
        lib.tjDestroy(ctypes.c_void_p(handle))


@njit(nogil=True)
def _cubic(x):  # type: ignore[no-untyped-def]
    """Evaluate Keys's cubic with a = -0.5, Pillow's BICUBIC."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((2.5 - 0.5 * x) * x - 4) * x + 2
    return 0.0


@njit(nogil=True)
def _weigh(begin, length, low, high, mirrored, firsts, weights, kernel):  # type: ignore[no-untyped-def]
    """Compute the filter along one axis: Pillow's ``precompute_coeffs``, in integers whose sum is exactly 1.

    Args:
        begin: start of the box in samples of the plane, float.
        length: of the box in samples of the plane, float.
        low: first sample that may be used.
        high: end of the samples that may be used.
        mirrored: True puts the last output first.
        firsts: int64 [S], written: the first sample of each output.
        weights: int16 [S, K], written: the weight of each sample.
        kernel: float64 [K], overwritten.

    Returns:
        The number of taps in use, even; the first sample in use and the one after the last.
    """
    size = firsts.size
    scale = length / size
    spread = max(scale, 1.0)
    most, used, unused = 1, high, low
    for place in range(size):
        center = begin + (place + 0.5) * scale
        first = max(low, math.floor(center - 2 * spread + 0.5))
        count = min(high, math.floor(center + 2 * spread + 0.5)) - first
        total = 0.0
        for tap in range(count):
            kernel[tap] = _cubic((first + tap + 0.5 - center) / spread)
            total += kernel[tap]
        output = size - 1 - place if mirrored else place
        firsts[output] = first
        running, given = 0.0, 0
        for tap in range(count):
            running += kernel[tap]
            upto = int(np.rint(_ONE * running / total))
            weights[output, tap] = upto - given
            given = upto
        weights[output, count:] = 0
        most, used, unused = max(most, count), min(used, first), max(unused, first + count)
    return most + most % 2, used, unused


@njit(nogil=True)
def _reduce_rows(plane, firsts, weights, taps, left, right, row, reduced):  # type: ignore[no-untyped-def]
    """Filter down the columns ``left`` to ``right`` of a plane, the first pass.

    Args:
        plane: uint8 [height, width].
        firsts: int64 [S], first row of each output.
        weights: int16 [S, K].
        taps: number of taps in use.
        left: first column.
        right: end of the columns.
        row: int32 [largest side], overwritten.
        reduced: int16 [columns, S], written: [column, output row].
    """
    sums = row[: right - left]
    last = plane.shape[0] - 1  # a sample with a weight of 0 may be any
    for output in range(firsts.size):
        sums[:] = 1 << (13 - _BETWEEN)
        for tap in range(0, taps, 2):
            # Typed, so that the compiler vectorizes 32-bit numbers; two taps at a time are the fastest.
            one, other = np.int32(weights[output, tap]), np.int32(weights[output, tap + 1])
            first = firsts[output] + tap
            above, below = plane[min(first, last), left:right], plane[min(first + 1, last), left:right]
            for x in range(sums.size):
                sums[x] = np.int32(sums[x] + np.int32(one * np.int32(above[x])) + np.int32(other * np.int32(below[x])))
        for x in range(sums.size):
            reduced[x, output] = np.int16(sums[x] >> (14 - _BETWEEN))


@njit(nogil=True)
def _reduce_column(reduced, first, weights, taps, column):  # type: ignore[no-untyped-def]
    """Filter one output column, the second pass: ``column`` int32 [S], written, with ``_BETWEEN`` fractional bits."""
    column[:] = _HALF
    for tap in range(taps):
        weight, values = np.int32(weights[tap]), reduced[first + tap]
        for y in range(column.size):
            column[y] = np.int32(column[y] + np.int32(weight * np.int32(values[y])))
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
def _resize(planes, sides, box, beyond, raw, image, scratch, thread):  # type: ignore[no-untyped-def]
    """Resize a box of three planes and convert it to RGB.

    Args:
        planes: luma, Cb, Cr, or R, G, B if ``raw``, uint8 [height, width], padded to whole chroma samples.
        sides: height and width without padding.
        box: float64 [5]; see ``decode``.
        beyond: see ``decode``.
        raw: True for planes that are RGB already.
        image: uint8 [S, S, 3], written.
        scratch: memory of the threads.
        thread: index of this thread.
    """
    firsts, weights = scratch.firsts[thread], scratch.weights[thread]
    reduced, columns, pixels = scratch.reduced[thread], scratch.columns[thread], scratch.pixels[thread]
    used = np.empty((4, 3), np.int64)
    for plane in range(2):  # Cb and Cr are alike
        for axis in range(2):
            step = planes[0].shape[axis] // planes[plane].shape[axis]
            begin, length, side = box[axis], box[axis + 2], float(sides[axis])
            low, high = (0.0, side) if beyond else (begin, begin + length)
            mirrored = axis == 1 and box[4] != 0
            index = 2 * plane + axis
            used[index] = _weigh(
                begin / step, length / step, int(low) // step, math.ceil(high / step), mirrored,
                firsts[index], weights[index], scratch.kernel[thread],
            )  # fmt: skip
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


@njit(nogil=True)
def _adler32(content):  # type: ignore[no-untyped-def]
    """Compute zlib's Adler-32 of bytes, uint8 [n], by sums that the compiler vectorizes."""
    one, two = 1, 0
    for start in range(0, content.size, _BLOCK):
        block = content[start : start + _BLOCK]
        plain, weighted = np.uint32(0), np.uint32(0)
        for place in range(block.size):
            value = np.uint32(block[place])
            plain = np.uint32(plain + value)
            weighted = np.uint32(weighted + np.uint32(np.uint32(block.size - place) * value))
        two = (two + block.size * one + np.int64(weighted)) % _PRIME
        one = (one + np.int64(plain)) % _PRIME
    return two * 65536 + one


@njit(parallel=True, nogil=True, cache=True)
def decode(file, table, checksums, rows, boxes, beyond, images, scratch, status):  # type: ignore[no-untyped-def]
    """Decode, crop, resize and mirror B samples on T threads.

    Args:
        file: uint8 [bytes], the whole .beton, mapped.
        table: int64 [N, 5]: offset and length of each image in ``file``, its height and width, and 1 for raw RGB
            pixels instead of a JPEG.
        checksums: int64 [N], Adler-32 of each image; -1 where it is unknown.
        rows: int64 [B], the samples.
        boxes: float64 [B, 5]: top, left, height, width (pixels of the stored image), 1 if mirrored.
        beyond: True includes pixels outside the box in the filter at its border, as resizing before cropping does;
            False excludes them, as cropping before resizing does.
        images: uint8 [B, S, S, 3], written.
        scratch: memory of the threads.
        status: int32 [B], written: 0, or ``DAMAGED``.
    """
    threads = scratch.handles.size
    for thread in prange(threads):
        for b in range(thread, rows.shape[0], threads):
            offset, length, height, width, raw = table[rows[b]]
            source = np.uint64(file.ctypes.data) + np.uint64(offset)
            handle, header, pointers = scratch.handles[thread], scratch.header[thread], scratch.pointers[thread]
            place = np.uint64(header.ctypes.data)
            four, eight, twelve = np.uint64(4), np.uint64(8), np.uint64(12)
            status[b] = DAMAGED
            if checksums[rows[b]] >= 0 and checksums[rows[b]] != _adler32(file[offset : offset + length]):
                continue
            memory = scratch.planes[thread]
            if raw:
                if length != 3 * height * width:
                    continue
                interleaved = file[offset : offset + length].reshape((height, width, 3))
                area = height * width
                red, green = memory[:area].reshape((height, width)), memory[area : 2 * area].reshape((height, width))
                blue = memory[2 * area : 3 * area].reshape((height, width))
                for y in range(height):
                    for x in range(width):
                        red[y, x] = interleaved[y, x, 0]
                        green[y, x] = interleaved[y, x, 1]
                        blue[y, x] = interleaved[y, x, 2]
                _resize((red, green, blue), (height, width), boxes[b], beyond, True, images[b], scratch, thread)
                status[b] = 0
                continue
            if _read_header(handle, source, np.uint64(length), place, place + four, place + eight, place + twelve):
                continue
            sampling = header[2]
            if header[0] != width or header[1] != height or header[3] != _YCBCR or not 0 <= sampling < len(_WIDER):
                continue
            wider, higher = _WIDER[sampling], _HIGHER[sampling]
            if wider == 0:
                continue
            across, down = -(-width // wider), -(-height // higher)
            luma, chroma = across * wider * down * higher, across * down
            pointers[0] = np.uint64(memory.ctypes.data)
            pointers[1] = pointers[0] + np.uint64(luma)
            pointers[2] = pointers[1] + np.uint64(chroma)
            if _read_planes(handle, source, np.uint64(length), np.uint64(pointers.ctypes.data), 0, np.uint64(0), 0, 0):
                continue
            planes = (
                memory[:luma].reshape((down * higher, across * wider)),
                memory[luma : luma + chroma].reshape((down, across)),
                memory[luma + chroma : luma + 2 * chroma].reshape((down, across)),
            )
            _resize(planes, (height, width), boxes[b], beyond, False, images[b], scratch, thread)
            status[b] = 0
