"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 70,000 labeled 28x28 gray images of clothing, MIT license.

The files are read here and not by torchvision, which needs torch, a download or a writable folder with decompressed
copies: Debian's package holds them compressed, and writing a data set needs no torch.
"""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.index import check_subset_size
from mrmae_ds.data.convert.options import Output, WriteOptions
from mrmae_ds.data.convert.subset import balanced_subset
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.data.types import ImageArray, IntArray
from mrmae_ds.errors import UserError

DEBIAN_PACKAGE = "dataset-fashion-mnist"
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SIDE = 32  # 28 padded, which strides of 16 and 4 tile
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "val": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class FashionMNIST:
    """One part of the set as (RGB image 32x32, label).

    Args:
        folder: of the four files.
        part: "train", or "val", the published test part.
        count: size of a class-balanced subset; None is all images.

    Raises:
        UserError: for files that are no idx files, and for an impossible count.
    """

    def __init__(self, folder: Path, part: str, count: int | None = None) -> None:
        images, labels = (folder / name for name in _FILES[part])
        self.labels: IntArray = read_idx(labels).astype(np.int64)
        pixels = read_idx(images)
        if pixels.shape != (len(self.labels), 28, 28):
            raise UserError(f"{images}: images {pixels.shape}, expected {(len(self.labels), 28, 28)}")
        pad = (SIDE - 28) // 2
        self.pixels = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad)))
        self.rows = np.arange(len(self.labels))
        if count is not None:
            if not 0 < count <= len(self.labels):
                raise UserError(f"the {part} count must be in 1..{len(self.labels)}, not {count}")
            self.rows = balanced_subset(self.labels, count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        return Image.fromarray(self.pixels[row]).convert("RGB"), int(self.labels[row])


def read_idx(path: Path) -> ImageArray:
    """Read a gzipped idx file of bytes (http://yann.lecun.com/exdb/mnist: magic number, sizes, values).

    Raises:
        UserError: if it is missing or not such a file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
        if (zeros, kind) != (0, 8) or len(values) != np.prod(shape):
            raise ValueError("wrong magic number or length")
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"{path}: not a gzipped idx file of bytes ({error}); fetch it again") from error
    return values.reshape(shape)


def debian_folder() -> Path | None:
    """Return the folder of Debian's package, or None if it is not installed."""
    if shutil.which("dpkg") is None:
        return None
    package = subprocess.run(["dpkg", "-L", DEBIAN_PACKAGE], capture_output=True, text=True, timeout=60, check=False)
    paths = (Path(line) for line in package.stdout.splitlines())
    return next((path.parent for path in paths if path.name == _FILES["train"][0]), None)


def find_files(source: str, cache: Path) -> Path:
    """Find or download the four idx files.

    Args:
        source: a folder, or "auto": Debian's package if it is installed, else a download by torchvision.
        cache: folder for the download, reused later.

    Returns:
        The folder that holds them.

    Raises:
        UserError: with the remedy, if they are not found.
    """
    names = [name for pair in _FILES.values() for name in pair]
    if source != "auto":
        missing = [name for name in names if not (Path(source) / name).is_file()]
        if missing:
            raise UserError(f"{source}: lacks {', '.join(missing)}; it must hold the four files of Fashion-MNIST")
        return Path(source)
    folder = debian_folder()
    if folder is not None:
        return folder
    try:
        from torchvision import datasets  # late: slow, and needed for the download only

        for train in (True, False):
            datasets.FashionMNIST(str(cache), train=train, download=True)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST is not installed and cannot be downloaded ({error}): run "
            f"`apt-get install {DEBIAN_PACKAGE}`, or put {', '.join(names)} into a folder and pass it with --source"
        ) from error
    return cache / "FashionMNIST" / "raw"


def write_fashion_mnist(output: Output, source: str = "auto") -> list[BetonInfo]:
    """Write Fashion-MNIST as train.beton and val.beton.

    Args:
        output: the files; of the conversion's options, its storage counts.
        source: a folder of the four files, or "auto"; see ``find_files``.

    Returns:
        The written data sets.

    Raises:
        UserError: if the files are not found or damaged, or as ``write_beton`` does.
    """
    folder = find_files(source, output.folder / "cache")
    parts = {
        "train": FashionMNIST(folder, "train", output.train_count),
        "val": FashionMNIST(folder, "val", output.val_count),
    }
    for part, count in (("train", output.train_count), ("val", output.val_count)):
        if count is not None:
            check_subset_size(count, parts[part].labels, part)
    return [
        write_beton(
            dataset,
            output.folder / f"{part}.beton",
            WriteOptions(max_side=SIDE, quality=95, storage=output.options.storage, max_bad=0),
            class_names=CLASS_NAMES,
            name=output.name or "Fashion-MNIST",
            source=f"Fashion-MNIST, {part}, {len(dataset)} images padded to {SIDE}x{SIDE}",
            train=(output.folder / "train.beton", parts["train"]) if part == "val" else None,
        )
        for part, dataset in parts.items()
    ]
