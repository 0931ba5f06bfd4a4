"""Time and size of converting images to a .beton, by the way they are stored.

    python benchmarks/conversion.py TREE [--max-side 512] [--rounds 3] [--out conversion.json]

TREE has a folder per class. Every variant is written ``rounds`` times, in turn, by one worker;
CPU time is that of the whole process tree, jpegtran's included, and its median over rounds is printed. Raw pixels are
written where --max-side is so small that ``--format auto`` would write them.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image
from result_file import write_result

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import read_sidecar
from mrmae_ds.data.convert import jpegs
from mrmae_ds.data.convert.folder import scan
from mrmae_ds.data.convert.options import RAW_SIDE, WriteOptions
from mrmae_ds.data.convert.splits import find_classes
from mrmae_ds.data.convert.writer import write_beton

PLAIN = "JPEG, encode, without markers"
RAW = "raw pixels"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"jpegs": "encode"},
    "JPEG, encode": {"jpegs": "encode"},
    "JPEG, auto": {"jpegs": "auto"},
    "JPEG, keep": {"jpegs": "keep"},
    RAW: {"storage": "raw"},
}


def encode_plainly(image: Image.Image, quality: int) -> bytes:
    """Encode as Pillow does by default, as versions before the index of segments did."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, comment=None)
    return stream.getvalue()


def convert(name: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Convert all images once; return CPU ms and bytes of an image, and the number of JPEGs kept without loss."""
    class_names, nested = find_classes(args.tree)
    images = scan(args.tree, class_names, nested)
    options = WriteOptions(max_side=args.max_side, quality=args.quality, workers=1, **VARIANTS[name])
    path = folder / "images.beton"
    encode = encode_plainly if name == PLAIN else jpegs.encode
    with mock.patch.object(jpegs, "encode", encode):
        info = write_beton(images, path, options, class_names=class_names, name=name, source="benchmark")
    sidecar = read_sidecar(path)
    stored = BetonFile(info).table[:, 1]
    return {
        "cpu_ms": 1000 * sidecar["cpu_seconds"] / info.num_samples,
        "bytes": float(stored.mean()),
        "kept": sidecar["converted"].get(jpegs.LOSSLESS, 0),
        "images": info.num_samples,
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Format medians over rounds as Markdown."""
    lines = ["| stored as | CPU ms an image | bytes an image | kept without loss |", "|---|---|---|---|"]
    for name, rounds in results.items():
        cpu_ms, size, kept, count = (statistics.median(run[key] for run in rounds) for key in rounds[0])
        lines.append(f"| {name} | {cpu_ms:.2f} | {size:,.0f} | {kept:.0f} of {count:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, convert, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--max-side", type=int, default=WriteOptions.max_side, help="pixels")
    parser.add_argument("--quality", type=int, default=WriteOptions.quality)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON of all rounds")
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name in VARIANTS if args.max_side <= RAW_SIDE else [name for name in VARIANTS if name != RAW]:
                results[name].append(convert(name, args, Path(folder)))
    print(table(results))
    if args.out:
        write_result(args.out, 1, "cpu", rounds=results)


if __name__ == "__main__":
    main()
