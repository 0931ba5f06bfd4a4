"""Numba kernel that decodes a JPEG and crops, resizes and mirrors it, without random state and without the GIL.

FFCV compiles its numba functions again for every ``Loader`` in every process and cannot cache them on disk, because the
addresses of its C functions are compiled in. Here the C functions (of libturbojpeg, which FFCV is linked with) are
referenced by symbol, so numba caches ``decode`` on disk, and one version serves training and evaluation, any number of
threads, any epoch and any seed. Only ``ffcv_decoder`` uses it; ``data.backend: pillow`` in a recipe reads the same
boxes without it.

Of a JPEG with an index (``beton.segments``), only the segments that a box touches are checked and decoded, as a JPEG of
their own: between two restart markers, no sample depends on others.

libturbojpeg returns the planes of luma and chroma as they are stored, chroma at half the resolution. They are resized
first and converted to RGB afterwards, which equals the opposite order up to rounding and chroma's interpolation, and
processes a third of the numbers. Resizing is by Pillow's bicubic filter in integers: the same on every machine.

Shapes: B samples in a batch, S output size, N samples in the file, T threads, K taps of the filter; "rounded" means up
to a multiple of ``vector_kernel.LANES``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
import numpy.typing as npt
from ffcv.libffcv import lib
from numba import njit, prange, types

from mrmae_ds.data.beton import segments
from mrmae_ds.data.loaders import resize_kernel, segment_kernel, vector_kernel
from mrmae_ds.data.loaders.resize_kernel import resize, weigh_axes
from mrmae_ds.data.loaders.segment_kernel import adler32, cut, has_index
from mrmae_ds.data.loaders.vector_kernel import LANES, SIDE, checksum_of_files, take_next
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
_YCBCR, _GRAY = 1, 2  # libturbojpeg's numbers of the color spaces
# Width and height of a chroma sample in luma samples, by libturbojpeg's number of the subsampling: 4:4:4, 4:2:2,
# 4:2:0, gray (which has no chroma planes), 4:4:0, 4:1:1.
_WIDER, _HIGHER = (1, 2, 2, 1, 1, 4), (1, 1, 2, 1, 2, 1)
_BLOCK_SIDE = 8  # of a block of coefficients, samples
_LINE = 64  # of a cache, bytes
_PADDING = 4  # planes are padded to whole chroma samples


class Scratch(NamedTuple):
    """Memory of T threads; no content outlives an image.

    Attributes:
        taken: int64 [1], number of images of the batch that a thread has taken.
        handles: uint64 [T], libturbojpeg's decoders.
        header: int32 [T, 4], width, height, subsampling and color space.
        pointers: uint64 [T, 3], addresses of the planes.
        planes: uint8 [T, bytes of the largest image].
        parts: uint8 [T, bytes of the longest JPEG], the JPEG of the segments of a box.
        pairs: int32 [T, ...], pairs of rows of a plane.
        rows: int16 [T, SIDE, largest side, rounded], rows after the first pass.
        columns: int32 [T, 3, (largest side + K) / 2, S, rounded], pairs of columns of the planes after the first pass;
            the part beyond their end is multiplied by weights of 0.
        lines: int32 [T, 3, S rounded], a column after the second pass.
        pixels: int32 [T, SIDE, S rounded], columns of the image.
        firsts: int64 [T, 4, S], first input sample of each output, for luma down, luma across, chroma down, chroma
            across.
        weights: int32 [T, 4, K / 2, S], of the same axes.
        sums: float64 [T, K + 3, S].
    """

    taken: IntArray
    handles: UIntArray
    header: npt.NDArray[np.int32]
    pointers: UIntArray
    planes: ImageArray
    parts: ImageArray
    pairs: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int16]
    columns: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]
    pixels: npt.NDArray[np.int32]
    firsts: IntArray
    weights: npt.NDArray[np.int32]
    sums: FloatArray


def _aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Allocate an array that starts at a cache line: a vector across two lines takes twice the time."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype).reshape(shape)


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
    side = int(table[:, 2:4].max()) + _PADDING
    width, lines = side + 1 + -(side + 1) % LANES, size + -size % LANES
    taps = 2 * (2 * -(-side // size) + 2)
    area = int(((table[:, 2] + _PADDING) * (table[:, 3] + _PADDING)).max())
    return Scratch(
        taken=np.zeros(1, dtype=np.int64),
        handles=np.array(handles, dtype=np.uint64),
        header=np.zeros((threads, 4), dtype=np.int32),
        pointers=np.zeros((threads, 3), dtype=np.uint64),
        planes=np.empty((threads, 3 * area), dtype=np.uint8),
        parts=np.empty((threads, int(table[:, 1].max()) + 2), dtype=np.uint8),
        pairs=_aligned((threads, (side + taps) // 2 * width), np.int32),
        rows=_aligned((threads, SIDE, width), np.int16),
        columns=_aligned((threads, 3, (width + taps) // 2, lines), np.int32),
        lines=_aligned((threads, 3, lines), np.int32),
        pixels=_aligned((threads, SIDE, lines), np.int32),
        firsts=np.zeros((threads, 4, size), dtype=np.int64),
        weights=np.zeros((threads, 4, taps // 2, size), dtype=np.int32),
        sums=np.zeros((threads, taps + 3, size)),
    )


def free_scratch(scratch: Scratch) -> None:
    """Release libturbojpeg's decoders."""
    for handle in scratch.handles.tolist():
        lib.tjDestroy(ctypes.c_void_p(handle))


@njit(nogil=True)
def _decode_raw(content, sides, box, beyond, image, scratch, thread):  # type: ignore[no-untyped-def]
    """Crop and resize an image of raw RGB pixels; see ``_decode_jpeg``. Returns False if it is damaged."""
    height, width = sides
    if content.size != 3 * height * width:
        return False
    interleaved, memory = content.reshape((height, width, 3)), scratch.planes[thread]
    area = height * width
    red, green = memory[:area].reshape((height, width)), memory[area : 2 * area].reshape((height, width))
    blue = memory[2 * area : 3 * area].reshape((height, width))
    for y in range(height):
        for x in range(width):
            red[y, x] = interleaved[y, x, 0]
            green[y, x] = interleaved[y, x, 1]
            blue[y, x] = interleaved[y, x, 2]
    used = weigh_axes(sides, (1, 1), box, beyond, scratch, thread)
    resize((red, green, blue), used, True, box[4] != 0, image, scratch, thread)
    return True


@njit(nogil=True)
def cut_used(jpeg, checksum, sides, steps, used, part):  # type: ignore[no-untyped-def]
    """Make a JPEG of the segments whose samples the filters use.

    Args:
        jpeg: uint8 [n], with an index.
        checksum: its Adler-32; -1 if it is unknown.
        sides: height and width, pixels.
        steps: height and width of a chroma sample in luma samples.
        used: int64 [4, 3]; see ``weigh_axes``.
        part: uint8 [n + 2], written.

    Returns:
        Results of ``cut``.
    """
    top, left = min(used[0, 1], used[2, 1] * steps[0]), min(used[1, 1], used[3, 1] * steps[1])
    bottom, right = max(used[0, 2], used[2, 2] * steps[0]), max(used[1, 2], used[3, 2] * steps[1])
    region = top, left, min(bottom, sides[0]), min(right, sides[1])
    return cut(jpeg, checksum, sides, (_BLOCK_SIDE * steps[0], _BLOCK_SIDE * steps[1]), region, part)


@njit(nogil=True)
def _decode_jpeg(jpeg, checksum, sides, box, beyond, image, scratch, thread):  # type: ignore[no-untyped-def]
    """Decode, crop and resize a JPEG.

    Args:
        jpeg: uint8 [n].
        checksum: its Adler-32; -1 if it is unknown.
        sides: expected height and width.
        box: float64 [5]; see ``decode``.
        beyond: see ``decode``.
        image: uint8 [S, S, 3], written.
        scratch: memory of the threads.
        thread: index of this thread.

    Returns:
        False if it is damaged.
    """
    indexed = has_index(jpeg)
    if not indexed and checksum >= 0 and checksum != adler32(jpeg):
        return False
    handle, header, pointers = scratch.handles[thread], scratch.header[thread], scratch.pointers[thread]
    source, size, place = np.uint64(jpeg.ctypes.data), np.uint64(jpeg.size), np.uint64(header.ctypes.data)
    four, eight, twelve = np.uint64(4), np.uint64(8), np.uint64(12)
    if _read_header(handle, source, size, place, place + four, place + eight, place + twelve):
        return False
    sampling = header[2]
    if header[0] != sides[1] or header[1] != sides[0] or not 0 <= sampling < len(_WIDER):
        return False
    gray = _WIDER[sampling] * _HIGHER[sampling] == 1 and header[3] == _GRAY
    if header[3] != _YCBCR and not gray:
        return False
    steps = _HIGHER[sampling], _WIDER[sampling]
    used = weigh_axes(sides, steps, box, beyond, scratch, thread)
    height, width = sides
    if indexed:
        part = scratch.parts[thread]
        length, above, before, height, width = cut_used(jpeg, checksum, sides, steps, used, part)
        if length == 0:
            return False
        source, size = np.uint64(part.ctypes.data), np.uint64(length)
        for index in range(4):
            moved = (above, before)[index % 2] // (steps[index % 2] if index >= 2 else 1)
            scratch.firsts[thread, index] -= moved
            used[index, 1:] -= moved
    memory = scratch.planes[thread]
    down, across = -(-height // steps[0]), -(-width // steps[1])
    luma, chroma = across * steps[1] * down * steps[0], across * down
    pointers[0] = np.uint64(memory.ctypes.data)
    pointers[1] = pointers[0] + np.uint64(luma)
    pointers[2] = pointers[1] + np.uint64(chroma)
    if _read_planes(handle, source, size, np.uint64(pointers.ctypes.data), 0, np.uint64(0), 0, 0):
        return False
    if gray:
        memory[luma : luma + 2 * chroma] = 128
    planes = (
        memory[:luma].reshape((down * steps[0], across * steps[1])),
        memory[luma : luma + chroma].reshape((down, across)),
        memory[luma + chroma : luma + 2 * chroma].reshape((down, across)),
    )
    resize(planes, used, False, box[4] != 0, image, scratch, thread)
    return True


def _compile(sources: int) -> Callable[..., None]:
    """Return ``decode``, compiled at its first call; ``sources``: ``checksum_of_files`` of what it calls."""

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
        _ = sources
        scratch.taken[0] = 0
        counter = np.uint64(scratch.taken.ctypes.data)
        for thread in prange(scratch.handles.size):
            while True:
                b = take_next(counter)
                if b >= rows.shape[0]:
                    break
                offset, length, height, width, raw = table[rows[b]]
                content, sides, checksum = file[offset : offset + length], (height, width), checksums[rows[b]]
                if raw:
                    sound = checksum < 0 or checksum == adler32(content)
                    sound = sound and _decode_raw(content, sides, boxes[b], beyond, images[b], scratch, thread)
                else:
                    sound = _decode_jpeg(content, checksum, sides, boxes[b], beyond, images[b], scratch, thread)
                status[b] = 0 if sound else DAMAGED

    return decode


decode = _compile(checksum_of_files(segments, resize_kernel, segment_kernel, vector_kernel))
