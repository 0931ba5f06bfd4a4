"""Cost of decoding by parts: CPU milliseconds per image on one thread, of this project's kernel and of FFCV's.

    python benchmarks/loader_limits.py train.beton [--size 224] [--rounds 7] [--against loader.json] [--out limits.json]
    python benchmarks/loader_limits.py --measured limits.json --against loader.json

The parts are called one by one on the same images, with the boxes of training (20 % to 100 % of an image): those of
this project's kernel on the segments of each JPEG that its box touches, and on whole JPEGs, the same without their
index; those of FFCV's library on whole JPEGs. The minimum of the rounds counts, because other work on the machine can
only add to it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from loader import SCALE, TO_REACH, Settings, ours, recorded

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.segments import MAGIC, NUMBERS, read_header
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


@numba.njit(nogil=True)
def weigh_all(sides, steps, boxes, scratch):  # type: ignore[no-untyped-def]
    """Compute the filters of every box; sides, steps: int64 [N, 2]."""
    for row in range(len(boxes)):
        side, step = (sides[row, 0], sides[row, 1]), (steps[row, 0], steps[row, 1])
        jpeg_kernel.weigh_axes(side, step, boxes[row], False, scratch, 0)


@numba.njit(nogil=True)
def cut_all(content, table, checksums, steps, boxes, scratch, parts):  # type: ignore[no-untyped-def]
    """Cut the segments of every box out of its JPEG, each behind the last one; returns their lengths, int64 [N]."""
    lengths, end = np.zeros(len(boxes), np.int64), 0
    for row in range(len(boxes)):
        offset, length, height, width = table[row, :4]
        side, step = (height, width), (steps[row, 0], steps[row, 1])
        used = jpeg_kernel.weigh_axes(side, step, boxes[row], False, scratch, 0)
        part = parts[end : end + length + 2]
        jpeg = content[offset : offset + length]
        lengths[row] = jpeg_kernel.cut_used(jpeg, checksums[row], side, step, used, part)[0]
        end += lengths[row]
    return lengths


@numba.njit(nogil=True)
def sum_all(parts, lengths):  # type: ignore[no-untyped-def]
    """Compute the checksum of every part."""
    total, end = 0, 0
    for length in lengths:
        total ^= jpeg_kernel.adler32(parts[end : end + length])
        end += length
    return total


class Images:
    """JPEGs of N images in one array, with their table and checksums.

    Args:
        jpegs: the JPEGs.
        table: of the images they are of; see ``jpeg_kernel.decode``.
    """

    def __init__(self, jpegs: list[bytes], table: np.ndarray) -> None:
        self.jpegs, self.table = jpegs, table.copy()
        lengths = np.array([len(jpeg) for jpeg in jpegs])
        self.table[:, 0], self.table[:, 1] = np.cumsum(lengths) - lengths, lengths
        self.checksums = np.array([zlib.adler32(jpeg) for jpeg in jpegs])
        self.content = np.frombuffer(b"".join(jpegs), dtype=np.uint8)


class Parts:
    """Parts of decoding; each method applies one to all N images."""

    def __init__(self, beton: Path, size: int) -> None:
        file = BetonFile(check_beton(beton))
        self.rows = np.arange(len(file.labels))
        jpegs = [file.jpeg(row) for row in self.rows.tolist()]
        if not all(jpeg[NUMBERS - len(MAGIC) : NUMBERS] == MAGIC for jpeg in jpegs):
            raise SystemExit(f"{beton}: has images without an index of their segments; write it again")
        self.indexed = Images(jpegs, file.table)
        # The index is an application segment at the start, of a length that bytes 4 and 5 say.
        plain = [jpeg[:2] + jpeg[4 + int.from_bytes(jpeg[4:6], "big") :] for jpeg in jpegs]
        self.whole = Images(plain, file.table)
        self.unmarked: list[bytes] = []  # the same without restart markers
        self.sides = file.table[:, 2:4]
        crop = CropSettings(scale=SCALE)
        boxes = random_boxes(self.sides[:, 0], self.sides[:, 1], self.rows, seed=0, epoch=0, crop=crop)
        self.boxes, self.steps = boxes.astype(np.float64), np.array([_chroma_step(jpeg) for jpeg in jpegs])
        side = int(self.sides.max()) + 8
        self.memory = np.empty((3, side, side), dtype=np.uint8)
        self.images = np.empty((len(self.rows), size, size, 3), dtype=np.uint8)
        self.status = np.zeros(len(self.rows), dtype=np.int32)
        for name in ("tjInitDecompress", "tjInitTransform"):
            getattr(lib, name).restype = ctypes.c_void_p
        self.decompressor = ctypes.c_void_p(lib.tjInitDecompress())
        self.transformer = ctypes.c_void_p(lib.tjInitTransform())
        self.scratch = jpeg_kernel.make_scratch(self.indexed.table, size, 1)
        self.parts = np.empty(self.indexed.content.size + 2 * len(jpegs), dtype=np.uint8)
        self.kernel(self.indexed)  # compiled first, as in training
        self.lengths = self.cut()
        ends = np.cumsum(self.lengths).tolist()
        starts = [0, *ends[:-1]]
        self.touched = [self.parts[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]

    def weigh(self) -> None:
        """Compute the weights of the filters."""
        weigh_all(self.sides, self.steps, self.boxes, self.scratch)

    def cut(self) -> np.ndarray:
        """Compute the weights, and check and copy the segments that they touch."""
        images = self.indexed
        return cut_all(images.content, images.table, images.checksums, self.steps, self.boxes, self.scratch, self.parts)

    def checksum(self) -> None:
        """Compute the checksums of the touched segments."""
        sum_all(self.parts, self.lengths)

    def huffman(self, jpegs: list[bytes]) -> None:
        """Decode the coefficients alone."""
        transform, result, length = Transform(options=NO_OUTPUT), ctypes.c_void_p(), ctypes.c_ulong()
        into = ctypes.byref(result), ctypes.byref(length), ctypes.byref(transform)
        for jpeg in jpegs:
            lib.tjTransform(self.transformer, jpeg, ctypes.c_ulong(len(jpeg)), 1, *into, 0)

    def remove_markers(self) -> None:
        """Transcode the JPEGs without restart markers, and without loss: libjpeg-turbo copies none."""
        transform, result, length = Transform(), ctypes.c_void_p(), ctypes.c_ulong()
        into = ctypes.byref(result), ctypes.byref(length), ctypes.byref(transform)
        for jpeg in self.whole.jpegs:
            if lib.tjTransform(self.transformer, jpeg, ctypes.c_ulong(len(jpeg)), 1, *into, 0):
                raise SystemExit("libjpeg-turbo cannot transcode an image")
            self.unmarked.append(ctypes.string_at(result.value or 0, length.value))

    def planes(self, jpegs: list[bytes]) -> None:
        """Decode to planes: also the inverse DCT, luma and chroma as they are stored."""
        planes = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in self.memory))
        for jpeg in jpegs:
            length = ctypes.c_ulong(len(jpeg))
            lib.tjDecompressToYUVPlanes(self.decompressor, jpeg, length, planes, 0, None, 0, 0)

    def rgb(self) -> None:
        """Decode to RGB: also chroma's interpolation and colors, with the fast inverse DCT, as FFCV does."""
        memory = ctypes.c_void_p(self.memory.ctypes.data)
        for jpeg in self.whole.jpegs:
            length = ctypes.c_ulong(len(jpeg))
            lib.tjDecompress2(self.decompressor, jpeg, length, memory, 0, 0, 0, 0, FAST_DCT)

    def area(self) -> None:
        """Resize the boxes by OpenCV, as FFCV does."""
        source, size = self.memory.ctypes.data, self.images.shape[1]
        sizes = zip(self.sides.tolist(), self.boxes.astype(int).tolist(), self.images, strict=True)
        for (height, width), (top, left, tall, wide, _), image in sizes:
            lib.resize(0, source, height, width, top, top + tall, left, left + wide, image.ctypes.data, size, size)

    def kernel(self, images: Images) -> None:
        """Run this project's kernel: checksum, planes, bicubic, colors, mirror."""
        jpeg_kernel.decode(
            images.content, images.table, images.checksums, self.rows, self.boxes, False, self.images, self.scratch,
            self.status,
        )  # fmt: skip
        assert not self.status.any()


def _chroma_step(jpeg: bytes) -> tuple[int, int]:
    """Return height and width of a chroma sample in luma samples."""
    header = read_header(jpeg)
    assert header is not None
    return header.mcu[1] // 8, header.mcu[0] // 8


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
    parts.remove_markers()
    count = len(parts.rows)
    batches = ours(Settings(args.beton, Path(), None, args.size, args.batch, 1), "ffcv")
    delivered = count // args.batch * args.batch
    functions: dict[str, Callable[[], object]] = {
        "weigh": parts.weigh,
        "cut": parts.cut,
        "checksum": parts.checksum,
        "huffman": lambda: parts.huffman(parts.touched),
        "planes": lambda: parts.planes(parts.touched),
        "kernel": lambda: parts.kernel(parts.indexed),
        "whole_huffman": lambda: parts.huffman(parts.whole.jpegs),
        "unmarked_huffman": lambda: parts.huffman(parts.unmarked),
        "whole_planes": lambda: parts.planes(parts.whole.jpegs),
        "whole_kernel": lambda: parts.kernel(parts.whole),
        "rgb": parts.rgb,
        "area": parts.area,
    }
    spent = {name: least(function, args.rounds) / count for name, function in functions.items()}
    spent["loader"] = least(lambda: sum(batches(1)), args.rounds) / delivered
    ms = {name: 1000 * seconds for name, seconds in spent.items()}
    return {**ms, "touched_bytes": float(parts.lengths.mean()), "bytes": parts.indexed.content.size / count}


def table(ms: dict[str, float]) -> str:
    """Format the parts as Markdown: of segments, of whole JPEGs, and of FFCV's functions on whole JPEGs."""
    lines = ["| part | segments, ms | whole JPEGs, ms | FFCV's functions, ms |", "|---|---|---|---|"]
    order = ms["loader"] - ms["kernel"]
    cut = ms["cut"] - ms["weigh"]
    for name, *columns in (
        ("check and copy of the segments", cut, None, None),
        ("of which checksum", ms["checksum"], None, None),
        ("Huffman decoding", ms["huffman"], ms["whole_huffman"], ms["whole_huffman"]),
        ("inverse DCT", ms["planes"] - ms["huffman"], ms["whole_planes"] - ms["whole_huffman"], None),
        ("inverse DCT, chroma's interpolation, colors", None, None, ms["rgb"] - ms["whole_huffman"]),
        ("weights of the filters", ms["weigh"], ms["weigh"], None),
        (
            "bicubic resizing, colors, mirror (whole JPEGs: and checksum)",
            ms["kernel"] - ms["cut"] - ms["planes"],
            ms["whole_kernel"] - ms["whole_planes"] - ms["weigh"],
            None,
        ),
        ("area resizing", None, None, ms["area"]),
        ("order, threads, copy of the batch", order, order, None),
        ("total", ms["loader"], ms["whole_kernel"] + order, ms["rgb"] + ms["area"]),
    ):
        lines.append(f"| {name} | " + " | ".join("" if part is None else f"{part:.2f}" for part in columns) + " |")
    share = ms["touched_bytes"] / ms["bytes"]
    return "\n".join(
        [
            *lines,
            "",
            f"The segments have {share:.0%} of the bytes of a JPEG ({ms['bytes']:,.0f}).",
            f"Huffman decoding of whole JPEGs without restart markers: {ms['unmarked_huffman']:.2f} ms.",
        ]
    )


def limits(ms: dict[str, float], result: dict[str, Any]) -> str:
    """Format the ratios to other readers that would follow if parts cost nothing, as Markdown.

    Args:
        ms: of ``measure``.
        result: of ``loader.py``.
    """
    own, *_ = TO_REACH[0]
    others = [other for name, other, _ in TO_REACH if name == own and isinstance(result["rounds"].get(other), list)]
    pairs = [zip(result["rounds"][own], result["rounds"][other], strict=True) for other in others]
    ratios = [statistics.median(one["images_per_s"] / other["images_per_s"] for one, other in pair) for pair in pairs]
    saved = {
        "as it is": 0.0,
        "check and copy of the segments": ms["cut"] - ms["weigh"],
        "weights of the filters": ms["weigh"],
        "resizing, colors, mirror": ms["kernel"] - ms["cut"] - ms["planes"],
        "order, threads, copy of the batch": ms["loader"] - ms["kernel"],
        "all of these": ms["loader"] - ms["planes"],
    }
    lines = ["| if this cost nothing | " + " | ".join(others) + " |", "|---" * (len(others) + 1) + "|"]
    for name, part in saved.items():
        factor = ms["loader"] / (ms["loader"] - part)
        lines.append(f"| {name} | " + " | ".join(f"{ratio * factor:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beton", type=Path, nargs="?")
    parser.add_argument("--size", type=int, default=224, help="pixels, both sides")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", type=Path, help="JSON of loader.py: ratios to other readers without each part")
    parser.add_argument("--measured", type=Path, help="JSON of this script: its times, instead of measuring them again")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.measured:
        ms = json.loads(args.measured.read_text())["ms_per_image"]
    elif args.beton:
        ms = measure(args)
        print(table(ms))
    else:
        parser.error("name a .beton, or --measured and --against")
    if args.against:
        print("", limits(ms, json.loads(args.against.read_text())), sep="\n")
    if args.out and not args.measured:
        settings = recorded(args)
        machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "versions": collect_versions()}
        content = {"settings": settings, "machine": machine, "ms_per_image": ms}
        args.out.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os._exit(0)  # FFCV's threads may outlive their loader


if __name__ == "__main__":
    main()
