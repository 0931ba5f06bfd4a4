"""FFCV image decoder that cuts, resizes and mirrors by given boxes: decoding holds no random state at all.

FFCV compiles its numba functions anew for every ``Loader`` in every process and can keep none of them on
disk, because the addresses of its C functions are baked into them. Here the one function that matters,
``_decode``, is compiled by us: it names the C functions by symbol, so numba keeps it in its on-disk cache,
and one version serves training and evaluation, any number of threads, any epoch and any seed. FFCV is told
not to compile the rest (``build_loader``), which then is a few lines of Python a batch.

Shapes: B samples in a batch, S output size, N samples in the file, T threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrmae_ds.data._ffcv import import_ffcv
from mrmae_ds.data.crop import IntArray

import_ffcv()

import llvmlite.binding  # noqa: E402
import numba  # noqa: E402
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import lib  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402
from numba import njit, prange, types  # noqa: E402

for _name in ("imdecode", "resize"):
    _address = ctypes.cast(getattr(lib, _name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"mrmae_ffcv_{_name}", _address)

# Addresses are passed as integers and C's bool as an int: calling conventions treat them alike.
_imdecode = types.ExternalFunction(
    "mrmae_ffcv_imdecode",
    types.int32(*[types.uint64] * 2, *[types.uint32] * 2, types.uint64, *[types.uint32] * 8),
)
_resize = types.ExternalFunction("mrmae_ffcv_resize", types.void(*[types.int64] * 11))


@njit(parallel=True, nogil=True, cache=True)
def _decode(file, table, rows, boxes, images, scratch, status):  # type: ignore[no-untyped-def]
    """Decode, cut, resize and mirror B samples on T threads.

    Everything this function calls must be in this file: numba's cache notices changes of this file only.

    Args:
        file: uint8 [bytes], the whole .beton, mapped.
        table: int64 [N, 4]: offset and length of each JPEG in ``file``, its height and width.
        rows: int64 [B], which samples.
        boxes: int64 [B, 5]: top, left, height, width, mirrored.
        images: uint8 [B, S, S, 3], written.
        scratch: uint8 [T, 3 * pixels of the largest picture], overwritten.
        status: int32 [B], written: 0, or the JPEG library's error.
    """
    threads = scratch.shape[0]
    size = images.shape[1]
    zero, one = np.uint32(0), np.uint32(1)
    for thread in prange(threads):
        pixels = np.uint64(scratch[thread].ctypes.data)
        for b in range(thread, rows.shape[0], threads):
            offset, length, height, width = table[rows[b]]
            tall, wide = np.uint32(height), np.uint32(width)
            source = np.uint64(file.ctypes.data) + np.uint64(offset)
            # The zeros and ones: crop offset, scale numerator and denominator, no crop, no flip. FFCV's crop
            # and flip are lossless JPEG transforms, which move the edges to multiples of 8 pixels.
            status[b] = _imdecode(
                source, np.uint64(length), tall, wide, pixels, tall, wide, zero, zero, one, one, zero, zero
            )
            top, left, box_height, box_width, mirrored = boxes[b]
            bottom, right = top + box_height, left + box_width
            image = images[b]
            target = np.int64(image.ctypes.data)
            _resize(0, np.int64(pixels), height, width, top, bottom, left, right, target, size, size)
            if mirrored:
                for row in range(size):
                    for column in range(size // 2):
                        opposite = size - 1 - column
                        for channel in range(3):
                            value = image[row, column, channel]
                            image[row, column, channel] = image[row, opposite, channel]
                            image[row, opposite, channel] = value


@dataclass(frozen=True)
class Decoded:
    """One batch as it lies in FFCV's ring of buffers: to be copied before the next one is asked for.

    Attributes:
        images: uint8 [B, S, S, 3].
        failed: rows of the file whose JPEG is damaged, int64; their pixels mean nothing.
        error: what else went wrong. An exception in FFCV's thread would leave its consumer waiting for ever.
    """

    images: npt.NDArray[np.uint8] | None
    failed: IntArray | None
    error: Exception | None = None


class BoxDecoder(SimpleRGBImageDecoder):
    """Decoder for an ``RGBImageField`` in JPEG mode, output square.

    Attributes:
        boxes: (heights, widths, rows) -> int64 [B, 5], as ``crop.py`` makes them. Set before each epoch.
        torch_threads: what torch's number of threads is to be in FFCV's thread.
    """

    def __init__(self, size: int, table: IntArray, threads: int) -> None:
        """size: S, pixels; table: see ``_decode``; threads: T."""
        super().__init__()
        self.size = size
        self.table = table
        self.boxes: Callable[[IntArray, IntArray, IntArray], IntArray] | None = None
        self.torch_threads = torch.get_num_threads()
        self._scratch = np.empty((threads, 3 * int((table[:, 2] * table[:, 3]).max())), dtype=np.uint8)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """FFCV asks for the output's shape and for the memory of one sample."""
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Decoded]:
        """FFCV asks for the function to call on each batch."""

        def decode(rows: IntArray, images: npt.NDArray[np.uint8], _metadata: Any, storage: tuple[Any, ...]) -> Decoded:
            try:
                return self._decode_batch(rows, images, storage[0])
            except Exception as error:
                return Decoded(None, None, error)

        return decode

    def _decode_batch(self, rows: IntArray, images: npt.NDArray[np.uint8], file: npt.NDArray[np.uint8]) -> Decoded:
        assert self.boxes is not None
        if torch.get_num_threads() != self.torch_threads:
            torch.set_num_threads(self.torch_threads)
        boxes = self.boxes(self.table[rows, 2], self.table[rows, 3], rows)
        status = np.zeros(len(rows), dtype=np.int32)
        _decode(file.view(np.ndarray), self.table, rows, boxes, images, self._scratch, status)
        return Decoded(images, rows[status != 0])


def damaged_rows(file: npt.NDArray[np.uint8], table: IntArray, rows: IntArray) -> IntArray:
    """Decode samples as training does. Returns those whose JPEG is damaged, int64.

    Unlike Pillow, the decoder takes the JPEG library's warnings (a stretch of bad data) for errors.

    Args:
        file, table, rows: see ``_decode``.
    """
    boxes = np.zeros((len(rows), 5), dtype=np.int64)
    boxes[:, 2:4] = table[rows, 2:4]
    images = np.empty((len(rows), 8, 8, 3), dtype=np.uint8)
    threads = numba.config.NUMBA_NUM_THREADS
    scratch = np.empty((threads, 3 * int((table[rows, 2] * table[rows, 3]).max())), dtype=np.uint8)
    status = np.zeros(len(rows), dtype=np.int32)
    numba.set_num_threads(threads)
    _decode(file, table, rows, boxes, images, scratch, status)
    return rows[status != 0]


def build_loader(path: Path, decoder: BoxDecoder, *, batch_size: int, threads: int) -> Loader:
    """An FFCV ``Loader`` of the images alone. It compiles nothing: ``decoder`` brings a compiled function."""
    enabled = Compiler.is_enabled
    Compiler.set_enabled(False)
    try:
        pipelines = {"image": [decoder], "label": None, "index": None}
        return Loader(str(path), batch_size=batch_size, num_workers=threads, os_cache=True, pipelines=pipelines)
    finally:
        Compiler.set_enabled(enabled)
