"""Cost of decoding by parts: CPU milliseconds per image on one thread, of this project's kernel and of FFCV's.

    python benchmarks/loader_limits.py train.beton [--size 224] [--rounds 7] [--out loader_limits.json]

The parts are those of libturbojpeg and FFCV's library, called one by one on the same JPEGs, with the boxes of training
(20 % to 100 % of an image). The minimum of the rounds counts, because other work on the machine can only add to it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from loader import SCALE, Settings, ours, recorded

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.data.loaders._ffcv import import_ffcv
from mrmae_ds.data.loaders.crop import CropSettings, random_boxes
from mrmae_ds.records.environment import collect_versions, cpu_name

import_ffcv()

import numba  # noqa: E402
from ffcv.libffcv import lib  # noqa: E402

from mrmae_ds.data.loaders import jpeg_kernel  # noqa: E402

NO_OUTPUT, FAST_DCT = 16, 2048  # libturbojpeg's TJXOPT_NOOUTPUT and TJFLAG_FASTDCT


class Transform(ctypes.Structure):
    """libturbojpeg's ``tjtransform``."""

    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h", "op", "options")] + [
        (name, ctypes.c_void_p) for name in ("data", "filter")
    ]


class Parts:
    """Parts of decoding; each method applies one to all N images."""

    def __init__(self, beton: Path, size: int) -> None:
        self.file = BetonFile(check_beton(beton))
        self.rows = np.arange(len(self.file.labels))
        self.heights, self.widths = self.file.table[:, 2], self.file.table[:, 3]
        crop = CropSettings(scale=SCALE)
        self.boxes = random_boxes(self.heights, self.widths, self.rows, seed=0, epoch=0, crop=crop)
        self.jpegs = [self.file.jpeg(row) for row in self.rows.tolist()]
        side = int(self.file.table[:, 2:].max()) + 8
        self.memory = np.empty((3, side, side), dtype=np.uint8)
        self.images = np.empty((len(self.rows), size, size, 3), dtype=np.uint8)
        self.status = np.zeros(len(self.rows), dtype=np.int32)
        for name in ("tjInitDecompress", "tjInitTransform"):
            getattr(lib, name).restype = ctypes.c_void_p
        self.decompressor = ctypes.c_void_p(lib.tjInitDecompress())
        self.transformer = ctypes.c_void_p(lib.tjInitTransform())
        self.scratch = jpeg_kernel.make_scratch(self.file.table, size, 1)

    def huffman(self) -> None:
        """Decode the coefficients alone."""
        transform, result, length = Transform(options=NO_OUTPUT), ctypes.c_void_p(), ctypes.c_ulong()
        into = ctypes.byref(result), ctypes.byref(length), ctypes.byref(transform)
        for jpeg in self.jpegs:
            lib.tjTransform(self.transformer, jpeg, ctypes.c_ulong(len(jpeg)), 1, *into, 0)

    def planes(self) -> None:
        """Decode to planes: also the inverse DCT, luma and chroma as they are stored."""
        planes = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in self.memory))
        for jpeg in self.jpegs:
            length = ctypes.c_ulong(len(jpeg))
            lib.tjDecompressToYUVPlanes(self.decompressor, jpeg, length, planes, 0, None, 0, 0)

    def rgb(self) -> None:
        """Decode to RGB: also chroma's interpolation and colors, with the fast inverse DCT, as FFCV does."""
        memory = ctypes.c_void_p(self.memory.ctypes.data)
        for jpeg in self.jpegs:
            length = ctypes.c_ulong(len(jpeg))
            lib.tjDecompress2(self.decompressor, jpeg, length, memory, 0, 0, 0, 0, FAST_DCT)

    def area(self) -> None:
        """Resize the boxes by OpenCV, as FFCV does."""
        source, size = self.memory.ctypes.data, self.images.shape[1]
        sizes = zip(self.heights.tolist(), self.widths.tolist(), self.boxes.tolist(), self.images, strict=True)
        for height, width, (top, left, tall, wide, _), image in sizes:
            lib.resize(0, source, height, width, top, top + tall, left, left + wide, image.ctypes.data, size, size)

    def kernel(self) -> None:
        """Run this project's kernel: checksum, planes, bicubic, colors, mirror."""
        file, boxes = self.file, self.boxes.astype(np.float64)
        jpeg_kernel.decode(
            file.content, file.table, file.checksums, self.rows, boxes, False, self.images, self.scratch, self.status
        )


def least(function: Callable[[], object], rounds: int) -> float:
    """Return the CPU seconds of the cheapest round, after one warm-up round."""
    function()
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        spent.append(time.process_time() - start)
    return min(spent)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds per image."""
    numba.set_num_threads(1)
    parts = Parts(args.beton, args.size)
    count = len(parts.rows)
    batches = ours(Settings(args.beton, Path(), None, args.size, args.batch, 1), "ffcv")
    delivered = count // args.batch * args.batch
    names = ("huffman", "planes", "rgb", "area", "kernel")
    spent = {name: least(getattr(parts, name), args.rounds) / count for name in names}
    spent["loader"] = least(lambda: sum(batches(1)), args.rounds) / delivered
    return {name: 1000 * seconds for name, seconds in spent.items()}


def table(ms: dict[str, float]) -> str:
    """Format the parts as Markdown; both share the first one."""
    lines = ["| part | this project, ms | FFCV's functions, ms |", "|---|---|---|"]
    for name, ours_ms, ffcv_ms in (
        ("Huffman decoding", ms["huffman"], ms["huffman"]),
        ("inverse DCT", ms["planes"] - ms["huffman"], None),
        ("inverse DCT, chroma's interpolation, colors", None, ms["rgb"] - ms["huffman"]),
        ("checksum, bicubic resizing, colors, mirror", ms["kernel"] - ms["planes"], None),
        ("area resizing", None, ms["area"]),
        ("order, threads, copy of the batch", ms["loader"] - ms["kernel"], None),
        ("total", ms["loader"], ms["rgb"] + ms["area"]),
    ):
        lines.append(
            f"| {name} | " + " | ".join("" if part is None else f"{part:.2f}" for part in (ours_ms, ffcv_ms)) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beton", type=Path)
    parser.add_argument("--size", type=int, default=224, help="pixels, both sides")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ms = measure(args)
    print(table(ms))
    if args.out:
        settings = recorded(args)
        machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "versions": collect_versions()}
        content = {"settings": settings, "machine": machine, "ms_per_image": ms}
        args.out.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os._exit(0)  # FFCV's threads may outlive their loader


if __name__ == "__main__":
    main()
