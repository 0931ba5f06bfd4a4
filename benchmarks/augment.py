"""CPU time of fine-tuning's augmentation by parts, milliseconds per image on one thread.

    python benchmarks/augment.py train.beton [--size 224] [--rounds 5] [--out augment_cpu.json]

RandAugment is measured twice on the same images and draws: by the kernel that the ``ffcv`` backend uses, and by timm on
Pillow, as the ``pillow`` backend does and earlier versions did for both; their pixels are compared. Random erasing and
mixup run where the model is; here they run on the CPU. The minimum of the rounds counts, because other work on the
machine can only add to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from loader import POLICY, Settings, ours
from loader_limits import least
from PIL import Image
from result_file import write_result
from timm.data.mixup import Mixup

from mrmae_ds.data.loaders.augment import Augment, AugmentSettings, PolicyDraws
from mrmae_ds.data.loaders.erasing import SampleErasing
from mrmae_ds.data.loaders.rand_augment import BatchAugment
from mrmae_ds.imagenet import IMAGENET_MEAN


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds per image of each part.

    Raises:
        AssertionError: if the kernel's pixels are not Pillow's.
    """
    batches = ours(Settings(args.beton, Path(), None, args.size, args.batch, 1), "ffcv")
    delivered = sum(batches(0))
    ms = {"decoding, crop, flip": 1000 * least(lambda: sum(batches(1)), args.rounds) / delivered}

    settings, rng = AugmentSettings(IMAGENET_MEAN, POLICY), np.random.default_rng(0)
    keys = rng.integers(0, 1 << 63, args.num_images).astype(np.uint64)
    images = load(args, len(keys))
    kernel, pillow, results = BatchAugment(settings, args.size, 1), Augment(settings, args.size), images.copy()

    def by_kernel() -> None:
        results[:] = images
        kernel(results, keys)

    def by_pillow() -> list[np.ndarray]:
        pairs = zip(images, keys.tolist(), strict=True)
        return [np.asarray(pillow(Image.fromarray(image), key)) for image, key in pairs]

    draws = PolicyDraws(settings, args.size)
    parts: dict[str, Callable[[], object]] = {
        "RandAugment, kernel": by_kernel,
        "  of which draws": lambda: draws(keys),
        "RandAugment, timm on Pillow": by_pillow,
    }
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
    erasing = SampleErasing(0.25, torch.device("cpu"))
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    labels = torch.zeros(len(keys), dtype=torch.int64)
    parts["random erasing"] = lambda: erasing(floats, keys)
    parts["mixup or cutmix"] = lambda: mixup(floats, labels)
    ms |= {name: 1000 * least(part, args.rounds) / len(keys) for name, part in parts.items()}
    by_kernel()
    assert all(map(np.array_equal, results, by_pillow()))
    return ms


def load(args: argparse.Namespace, count: int) -> np.ndarray:
    """Return crops, uint8 [count, S, S, 3]."""
    from mrmae_ds.data.beton.file import BetonFile
    from mrmae_ds.data.beton.sidecar import check_beton

    file = BetonFile(check_beton(args.beton))
    side = (args.size, args.size)
    rows = [row % len(file.labels) for row in range(count)]
    return np.stack([np.asarray(file.image(row).resize(side)) for row in rows])


def main() -> None:
    """Parse, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beton", type=Path)
    parser.add_argument("--size", type=int, default=224, help="pixels, both sides")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ms = measure(args)
    print(
        "| part | ms per image |", "|---|---|", *(f"| {name} | {value:.3f} |" for name, value in ms.items()), sep="\n"
    )
    print(f"\nPillow / kernel: {ms['RandAugment, timm on Pillow'] / ms['RandAugment, kernel']:.1f}")
    if args.out:
        write_result(args.out, 1, "cpu", ms_per_image=ms)


if __name__ == "__main__":
    main()
