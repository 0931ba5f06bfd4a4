"""Host requirements of a node: RAM, images/s, CPU cores."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import Backend
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.errors import UserError
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.step import StepEstimate
from mrmae_ds.planning.stage import CountedStage
from mrmae_ds.planning.zero_memory import Items
from mrmae_ds.units import GIB

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def node_memory(recipe: Recipe, stage: CountedStage, step: StepEstimate, num_images: int) -> Items:
    """Return the bytes of a node's host memory by component; the page cache of the images comes last.

    Not counted are the loaders of stages that read no .beton file.
    """
    ranks, size = step.cluster.gpus_in_node, stage.task.image_size
    batch = step.memory.micro_batch * size * size * 3
    items: Items = {f"{ranks} ranks": ranks * CONSTANTS.process_gib * GIB}
    items["model during construction (freed before training)"] = ranks * 4.0 * step.memory.zero.counts.total
    for name, held in step.memory.zero.on_host().items():
        items[f"{name}, offloaded"] = ranks * held
    if offloaded := sum(weights.host for weights in step.memory.teachers.values()):
        items["teacher weights (pinned, per rank)"] = ranks * offloaded
    if stage.task.transform is None:
        return items
    if recipe.data.backend == "ffcv":
        batches = CONSTANTS.ffcv_batches
        items[f"batches decoded by FFCV ({batches:g} per rank, pinned)"] = ranks * batches * batch
        threads = recipe.loader.num_workers or 1
        items["buffers of the decoding threads"] = ranks * threads * 3 * CONSTANTS.image_side**2
    items["page cache of the training images"] = num_images * CONSTANTS.image_bytes
    return items


@dataclass(frozen=True)
class LoaderCost:
    """CPU cost of a loader, measured by benchmarks/loader.py or ``mrmae data bench``.

    Attributes:
        cpu_s_per_1000: CPU seconds per 1,000 images.
        size: image size in pixels.
        cpu: name of the CPU.
        source: file of the measurement.
    """

    cpu_s_per_1000: float
    size: int
    cpu: str
    source: str


def loader_name(backend: Backend, augment: AugmentSettings | None) -> str:
    """Return the name of a loader in files of measurements."""
    kind = " backend" if augment is None else " + RandAugment" if augment.policy else " + color jitter"
    return f"mrmae_ds, {backend}{kind}"


def loader_cost(
    recipe: Recipe, stage: CountedStage, bench: Path | None = None, folder: Path = RESULTS
) -> LoaderCost | None:
    """Return the measured cost of the recipe's loader; None if the results of benchmarks/loader.py lack it.

    Args:
        recipe: the recipe.
        stage: one of its stages.
        bench: file of ``mrmae data bench``, which comes first.
        folder: of the results.

    Raises:
        UserError: if ``bench`` is no such file, or has no measurement of the recipe's loader.
    """
    transform = stage.task.transform
    if transform is None:
        return None
    name = loader_name(recipe.data.backend, transform.of_workers(recipe.loader).augment)
    if bench is not None:
        cost = _read_cost(bench, name, stage.name)
        if cost is None:
            raise UserError(f"{bench}: has no measurement of {name!r}; write it with `mrmae data bench` of this recipe")
        return cost
    paths = sorted(folder.glob("loader*.json"))
    return next((cost for path in paths if (cost := _read_cost(path, name, stage.name))), None)


def _read_cost(path: Path, name: str, stage: str) -> LoaderCost | None:
    """Read the measurement of a loader from a file, that of ``stage`` if there are several; None if it has none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        measured = result["rounds"].get(name)
        if not isinstance(measured, list) or not measured:
            return None
        own = [each for each in measured if each.get("stage") == stage] or measured
        cost = statistics.median(float(each["cpu_s_per_1000"]) for each in own)
        size, cpu = int(own[0].get("size") or result["settings"]["size"]), str(result["machine"]["cpu"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `mrmae data bench FILE.beton --out {path}` writes it") from None
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError):
        return None
    if not (0 < cost < math.inf and size > 0):
        fault = f"{cost:g} CPU seconds for 1,000 images of {size} pixels"
        raise UserError(f"{path}: {name!r} took {fault}, which must be above 0; write it again with `mrmae data bench`")
    return LoaderCost(cost, size, cpu, path.name)
