"""Checkpoints of the whole training state, written beside their place and renamed into it.

DeepSpeed writes each shard straight to its final name and its pointer before the last shard is done. So a checkpoint
is written into ``checkpoints/.staging``, gets a manifest once every rank has finished, and is then renamed: a folder
``checkpoints/step_N`` with a manifest is whole, anything else is not a checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text

if TYPE_CHECKING:  # manifests are also read where nothing is trained, and importing it is slow and prints
    import deepspeed

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
STAGING = ".staging"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: optimiser steps done, processes that wrote it, recipe hash and seed, size of each file."""

    step: int
    world_size: int
    recipe_hash: str
    seed: int
    files: dict[str, int]


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, stage_dir: Path, step: int, recipe_hash: str, seed: int, keep: int
) -> None:
    """Write ``stage_dir/checkpoints/step_N`` and remove all but the newest ``keep``. All ranks must call it.

    Args:
        engine: what is saved.
        stage_dir: on a file system that all ranks share.
        step: optimiser steps done.
        recipe_hash: of the recipe; seed: of the run.
        keep: checkpoints left afterwards.
    """
    staging = stage_dir / FOLDER / STAGING
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    tag = f"step_{step:09d}"
    engine.save_checkpoint(str(staging), tag=tag, save_latest=False)
    dist.barrier()
    if first:
        shards = dist.get_world_size() if engine.zero_optimization_stage() > 0 else 0
        _commit(staging / tag, stage_dir / FOLDER / tag, step, recipe_hash, seed, shards)
        shutil.rmtree(staging, ignore_errors=True)
        # Steps beyond this one are of a run that was left for an older checkpoint.
        found = list_checkpoints(stage_dir)
        kept = [path for path in found if path.name <= tag][-keep:]
        for path in found:
            if path not in kept:
                shutil.rmtree(path)
    dist.barrier()


def _commit(written: Path, final: Path, step: int, recipe_hash: str, seed: int, expected_shards: int) -> None:
    files = {path.name: path.stat().st_size for path in sorted(written.iterdir()) if path.is_file()}
    shards = sum(name.endswith("optim_states.pt") for name in files)
    if shards != expected_shards or not files or not all(files.values()):
        raise RuntimeError(f"{written}: {shards} optimiser shards of {expected_shards}, or an empty file: {files}")
    manifest = Manifest(step, dist.get_world_size(), recipe_hash, seed, files)
    write_text(written / MANIFEST, json.dumps(asdict(manifest), indent=1))
    if final.exists():  # a resumed run saves this step again
        shutil.rmtree(final)
    written.rename(final)


def list_checkpoints(stage_dir: Path) -> list[Path]:
    """The committed checkpoints of a stage, oldest first."""
    folder = stage_dir / FOLDER
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"step_\d+", p.name) and (p / MANIFEST).is_file())


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, its files checked for presence and size.

    Raises:
        UserError: naming the file that is missing, damaged or cut off.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: no readable checkpoint manifest ({error}); name a folder checkpoints/step_N"
        ) from None
    for name, size in manifest.files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise UserError(f"{file}: {found} bytes instead of {size}; use an older checkpoint: --resume DIR")
    return manifest


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> int:
    """Restore the engine; the number of optimiser steps done. All ranks must call it.

    Raises:
        UserError: if the checkpoint was written by another number of processes, or is not whole.
    """
    manifest = read_manifest(checkpoint)
    if manifest.world_size != dist.get_world_size():
        raise UserError(
            f"{checkpoint}: written by {manifest.world_size} processes, {dist.get_world_size()} are running; "
            f"start {manifest.world_size}"
        )
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise UserError(f"{checkpoint}: DeepSpeed loaded nothing from it; use an older checkpoint: --resume DIR")
    return manifest.step
