"""Convert images of any source for training: python examples/own_data.py OUT_FOLDER.

A folder of image files needs no code: mrmae data write FOLDER --out OUT_FOLDER.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mrmae_ds.data.convert.writer import write_beton

CLASSES = ["dark", "bright"]


class Noise:
    """Images of your own, of any size and mode; here random ones. A data set has a length and (image, label) pairs."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its label; it is called in several processes, so it opens what it reads itself."""
        label = index % len(CLASSES)
        pixels = np.random.default_rng((self.seed, index)).integers(128 * label, 128 * (label + 1), (48, 40, 3))
        return Image.fromarray(pixels.astype(np.uint8)), label


folder = Path(sys.argv[1])
for part, count, seed in (("train", 64, 0), ("val", 16, 1)):
    info = write_beton(Noise(count, seed), folder / f"{part}.beton", class_names=CLASSES, name="Noise", source="random")
    print(f"{info.path}: {info.num_samples} images, classes {', '.join(info.class_names)}")
files = f"data.train={folder}/train.beton data.val={folder}/val.beton"
print(f"train on it: mrmae train --ds_config ds_configs/tiny.json --stage pretrain {files}")
