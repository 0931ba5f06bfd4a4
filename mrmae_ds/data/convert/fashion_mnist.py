"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 70,000 labeled 28x28 gray images of clothing, MIT."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.subset import balanced_subset
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.data.types import IntArray
from mrmae_ds.errors import UserError

DEBIAN_PACKAGE = "dataset-fashion-mnist"
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SIDE = 32  # 28 padded, so that strides of 16 and 4 tile it
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "val": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class FashionMNIST:
    """One part of the set as (RGB image 32x32, label); see ``writer.ImageDataset``."""

    def __init__(self, folder: Path, part: str, count: int | None = None) -> None:
        """Read ``part`` ("train" or "val", which is the published test part) of the four files in ``folder``.

        count: a class-balanced subset of this many; None: all.

        Raises UserError for files that are no idx files, and for a count that is not there.
        """
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


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzipped idx file of bytes (http://yann.lecun.com/exdb/mnist: magic, sizes, values).

    Raises UserError if it is missing or not such a file.
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
    """Where Debian's package has put the files, or None if it is not installed."""
    if shutil.which("dpkg") is None:
        return None
    listed = subprocess.run(["dpkg", "-L", DEBIAN_PACKAGE], capture_output=True, text=True, timeout=60, check=False)
    wanted = _FILES["train"][0]
    return next((Path(line).parent for line in listed.stdout.splitlines() if Path(line).name == wanted), None)


def find_files(source: str, cache: Path) -> Path:
    """The folder that holds the four idx files.

    Args:
        source: a folder, or "auto": Debian's package if it is installed, else a download by torchvision.
        cache: folder for the download, used again the next time.

    Raises UserError that says what to do.
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
        from torchvision import datasets

        for train in (True, False):
            datasets.FashionMNIST(str(cache), train=train, download=True)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST is not here and cannot be downloaded ({error}): run "
            f"`apt-get install {DEBIAN_PACKAGE}`, or "
            f"put {', '.join(names)} into a folder and pass it with --source"
        ) from error
    return cache / "FashionMNIST" / "raw"


def write_fashion_mnist(
    out: str | Path, *, source: str = "auto", train_count: int | None = None, val_count: int | None = None
) -> list[BetonInfo]:
    """Write OUT/train.beton and OUT/val.beton.

    Args:
        source: see ``find_files``.
        train_count, val_count: class-balanced subsets; None: all 60,000 and 10,000.

    Returns what was written. Raises UserError.
    """
    out = Path(out)
    folder = find_files(source, out / "cache")
    parts = {
        "train": FashionMNIST(folder, "train", train_count),
        "val": FashionMNIST(folder, "val", val_count),
    }
    return [
        write_beton(
            dataset,
            out / f"{part}.beton",
            WriteOptions(max_side=SIDE, quality=95, max_bad=0),
            class_names=CLASS_NAMES,
            name="Fashion-MNIST",
            source=f"Fashion-MNIST, {part}, {len(dataset)} images padded to {SIDE}x{SIDE}",
        )
        for part, dataset in parts.items()
    ]
