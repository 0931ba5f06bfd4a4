"""What a node needs beside its GPUs: memory, images/s, processors."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.imagenet import IMAGENET_TRAIN_SAMPLES
from mrmae_ds.planning.estimate import CountedStage, Estimate
from mrmae_ds.planning.zero_memory import Items
from mrmae_ds.profiling.gpus import GIB

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# FFCV decodes 3 batches ahead, beside the one that is read and the one that is written (its Loader's default).
RING = 3 + 2
# Batches of RandAugment in shared memory: those ahead and the one that is used (data/loaders/rand_augment.py).
AUGMENT_SLOTS = 3
# ImageNet-1K as data/README.md writes it: JPEGs of at most 512 pixels; docs.ffcv.io gives 65 GB for such a file.
IMAGE_BYTES, IMAGE_SIDE = 65e9 / IMAGENET_TRAIN_SAMPLES, 512
# A training process before its first tensor: Python, torch, DeepSpeed.
PROCESS_GIB = 3.0


def node_memory(recipe: Recipe, stage: CountedStage, estimate: Estimate, images: int) -> Items:
    """Bytes of host memory of a node, by what they are for; the page cache of the images last."""
    ranks, size = estimate.cluster.in_node, stage.simulation.task.image_size
    batch = estimate.micro_batch * size * size * 3
    items: Items = {f"{ranks} processes": ranks * PROCESS_GIB * GIB}
    items["the model as it is built, once (gone when training starts)"] = ranks * 4.0 * estimate.engine.census.total
    for name, held in estimate.engine.on_host().items():
        items[f"{name}, offloaded"] = ranks * held
    if waiting := sum(placed.host for placed in estimate.placed.values()):
        items["teachers' weights (pinned, each process its own)"] = ranks * waiting
    if recipe.data.backend == "ffcv":
        items[f"batches decoded by FFCV ({RING} a process, pinned)"] = ranks * RING * batch
        threads = recipe.loader.num_workers or 1
        items["scratch of the decoding threads"] = ranks * threads * 3 * IMAGE_SIDE**2
    if stage.simulation.task.augment is not None:
        items["batches being augmented (shared)"] = ranks * AUGMENT_SLOTS * batch
    items["page cache that holds the training images"] = images * IMAGE_BYTES
    return items


@dataclass(frozen=True)
class LoaderCost:
    """Processor seconds for 1,000 images, as benchmarks/loader.py measured them; on which processor."""

    cpu_s_per_1000: float
    size: int
    cpu: str


def loader_cost(recipe: Recipe, stage: CountedStage, folder: Path = RESULTS) -> LoaderCost | None:
    """The measured cost of the recipe's reader; None if no result of benchmarks/loader.py has it."""
    augmented = stage.simulation.task.augment is not None
    contender = f"mrmae_ds, {recipe.data.backend}" + (" + RandAugment" if augmented else " backend")
    for path in sorted(folder.glob("loader*.json")):
        result = json.loads(path.read_text())
        rounds = result.get("rounds")
        measured = rounds.get(contender) if isinstance(rounds, dict) else None
        if isinstance(measured, list) and measured:
            cost = statistics.median(each["cpu_s_per_1000"] for each in measured)
            return LoaderCost(cost, int(result["settings"]["size"]), str(result["machine"]["cpu"]))
    return None
