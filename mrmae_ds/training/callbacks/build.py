"""Optional callbacks, each switched on by its section of the recipe."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import StageName
from mrmae_ds.errors import UserError
from mrmae_ds.training.callbacks.base import Callback
from mrmae_ds.training.callbacks.garbage_collection import GarbageCollectionCallback
from mrmae_ds.training.callbacks.memory_snapshot import MemorySnapshotCallback
from mrmae_ds.training.callbacks.mlflow import MlflowCallback
from mrmae_ds.training.callbacks.nonfatal import NonfatalCallback
from mrmae_ds.training.callbacks.nvtx import NvtxCallback
from mrmae_ds.training.callbacks.profiler import ProfilerCallback
from mrmae_ds.training.callbacks.wandb import WandbCallback

# W&B itself gives up its start after 90 s and says why.
TRACKER_LIMIT_S = 180.0


def check_optional_callbacks(recipe: Recipe) -> None:
    """Check that the packages of the recipe's optional callbacks are installed.

    Raises:
        UserError: if one is not.
    """
    for name in ("wandb", "mlflow"):  # sections, extras and packages of trackers
        if getattr(recipe, name) is not None and find_spec(name) is None:
            raise UserError(
                f"{name}: the package is not installed; in the clone: pip install -e '.[{name}]' -c constraints.txt, "
                f"or remove the recipe's section {name}"
            )


def build_optional_callbacks(
    recipe: Recipe, stage_name: StageName, stage_dir: Path, rank: int, device: torch.device
) -> list[Callback]:
    """Build the callbacks that the recipe switches on. None of them changes a result, and none ends a training.

    Args:
        recipe: resolved recipe.
        stage_name: stage that is trained.
        stage_dir: output folder.
        rank: this rank; profiles, snapshots and trackers are rank 0's.
        device: device of this rank.
    """
    callbacks: list[Callback] = []
    if recipe.garbage_collection is not None:
        callbacks.append(GarbageCollectionCallback(recipe.garbage_collection))
    if recipe.nvtx is not None:
        callbacks.append(NvtxCallback(recipe.nvtx, device))
    if rank:
        return callbacks
    if recipe.profiler is not None:
        path = stage_dir / "profile" / f"step_{recipe.profiler.start_step:09d}.json"
        callbacks.append(NonfatalCallback("profiler", ProfilerCallback(recipe.profiler, path)))
    if recipe.memory_snapshot is not None:
        path = stage_dir / "profile" / f"memory_step_{recipe.memory_snapshot.start_step:09d}.pickle"
        callbacks.append(
            NonfatalCallback("memory_snapshot", MemorySnapshotCallback(recipe.memory_snapshot, path, device))
        )
    # The other ranks wait meanwhile, and so does the watchdog, which would end the job.
    limit_s = min(TRACKER_LIMIT_S, 60 * recipe.watchdog.timeout_minutes / 2)
    if recipe.wandb is not None:
        wandb = WandbCallback(recipe.wandb, recipe, stage_name, stage_dir)
        callbacks.append(NonfatalCallback("wandb", wandb, limit_s))
    if recipe.mlflow is not None:
        mlflow = MlflowCallback(recipe.mlflow, recipe, stage_name, stage_dir)
        callbacks.append(NonfatalCallback("mlflow", mlflow, limit_s))
    return callbacks
