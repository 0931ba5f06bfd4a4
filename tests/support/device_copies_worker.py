"""Copies between host and device on the GPU stand-in, whose copies are real: ``python -m ... FOLDER`` with train.beton.

Writes FOLDER/result.json. Not collected by pytest: tests/training/test_device_copies.py starts it under the stand-in.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.data.loaders.erasing import SampleErasing
from mrmae_ds.imagenet import IMAGENET_MEAN
from mrmae_ds.training.checkpoint.async_saver import copy_to_cpu
from mrmae_ds.training.checkpoint.save import write_shard
from tests.support.fake_gpu.compute import ComputeOnHost
from tests.support.fake_gpu.report import Counters
from tests.support.loaders import open_loader

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def augmented(path: Path, device: torch.device, place: Literal["cpu", "device"] = "cpu") -> list[Batch]:
    """Return two epochs of augmented batches, all of them kept."""
    settings = AugmentSettings(IMAGENET_MEAN, "rand-m9-mstd0.5-inc1")
    options = {"crop": CropSettings(scale=(0.2, 1.0)), "augment": settings, "seed": 5, "micro_batch": 8}
    loader = open_loader(path, device=device, augment_on=place, num_workers=2, **options)
    batches = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    loader.close()
    return batches


def main(folder: Path) -> None:
    """Measure, and write the result."""
    counters, result = Counters(), {}

    expected = augmented(folder / "train.beton", CPU)
    for place in ("cpu", "device"):
        counters.reset()
        with ComputeOnHost():
            batches = augmented(folder / "train.beton", CUDA, place)  # type: ignore[arg-type]
        found = result[f"augmented on {place}"] = counters.read() | {"batches": len(batches)}
        found["equal"] = all(torch.equal(a.images.cpu(), b.images) for a, b in zip(batches, expected, strict=True))

    keys = np.arange(64, dtype=np.uint64)
    erased = SampleErasing(0.25, CPU)(torch.zeros(64, 3, 32, 32), keys).flatten(1).any(1)
    images, erasing = torch.zeros(64, 3, 32, 32, device=CUDA), SampleErasing(0.25, CUDA)
    counters.reset()
    erasing(images, keys)
    result["erasing"] = counters.read() | {"erased": int(erased.sum())}

    values = [torch.arange(1000.0) + i for i in range(5)]
    state = {"on_device": [value.to(CUDA) for value in values], "on_host": values[0]}
    counters.reset()
    copied = copy_to_cpu(state)
    result["copies"] = counters.read()
    result["copies"]["equal"] = all(map(torch.equal, copied["on_device"], values))
    result["copies"]["pinned"] = [value.is_pinned() for value in copied["on_device"]]
    result["copies"]["own"] = copied["on_host"].data_ptr() != values[0].data_ptr()

    requested: list[bool] = []
    empty = torch.empty
    torch.empty = lambda *size, **options: (  # type: ignore[assignment]
        requested.append(bool(options.get("pin_memory"))) or empty(*size, **options)
    )
    write_shard(folder / "shard.pt", state)
    torch.empty = empty
    loaded = torch.load(folder / "shard.pt", map_location="cpu")
    result["saved"] = {"pinned": sum(requested), "equal": all(map(torch.equal, loaded["on_device"], values))}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
