"""Stand-in for DeepSpeed's engine in tests of checkpoints, and ready-made checkpoints on the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from mrmae_ds.training.checkpoint.async_saver import AsyncCheckpointer
from mrmae_ds.training.checkpoint.folder import Retention
from mrmae_ds.training.checkpoint.manifest import EngineLayout, FileEntry, Manifest, RunIdentity
from mrmae_ds.training.checkpoint.train_state import TrainState

IDENTITY = RunIdentity(recipe_hash="abc", seed=3, train="7ra1n" * 8, val="va1" * 8, teachers={"clip": "c11p"})
FILES = {"zero_pp_rank_0_mp_rank_00_optim_states.pt": b"optimizer", "mp_rank_00_model_states.pt": b"model"}


class FakeEngine:
    """Stand-in that passes a checkpoint's shards to the checkpoint engine as DeepSpeed does, and records its loads."""

    device = torch.device("cpu")

    def __init__(self, shards: dict[str, Any] | None = None, zero_stage: int = 3, loads: bool = True) -> None:
        self.shards = {name: {"content": content} for name, content in FILES.items()} if shards is None else shards
        self.zero_stage, self.loads = zero_stage, loads
        self.loaded: list[tuple[str, str]] = []
        self.checkpoint_engine: Any = None
        self.module = torch.nn.BatchNorm1d(2)
        self.global_steps = 0

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert save_latest is False
        for name, shard in self.shards.items():
            self.checkpoint_engine.save(shard, f"{folder}/{tag}/{name}")

    def zero_optimization_stage(self) -> int:
        return self.zero_stage

    def zero_sub_group_size(self) -> int:
        return 1000

    def bfloat16_enabled(self) -> bool:
        return False

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        self.loaded.append((folder, tag))
        self.global_steps = int(tag.split("_")[1])
        return (f"{folder}/{tag}" if self.loads else None), {}


def save(
    stage_dir: Path,
    step: int,
    engine: FakeEngine | None = None,
    retention: Retention | None = None,
    state: TrainState | None = None,
) -> Path:
    """Save a checkpoint of a fake engine in the foreground, as a run does; return its folder."""
    folders: list[Path] = []
    checkpointer = AsyncCheckpointer(
        engine or FakeEngine(),
        stage_dir,
        IDENTITY,
        retention or Retention(2),
        micro_batch=4,
        background=False,
        committed=lambda folder, step, results: folders.append(folder),
    )
    checkpointer.save(state or TrainState(step=step), {"top1": 1.5})
    return folders[0]


def written(stage_dir: Path, step: int = 5, identity: RunIdentity = IDENTITY, **changes: Any) -> Path:
    """Write a committed checkpoint's files directly, without an engine or the code that saves; return its folder."""
    checkpoint = stage_dir / "checkpoints" / f"step_{step:09d}"
    checkpoint.mkdir(parents=True)
    files = {}
    for name, content in FILES.items():
        (checkpoint / name).write_bytes(content)
        files[name] = FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    layout = EngineLayout(world_size=1, zero_stage=3, dtype="float32", sub_group_size=1000)
    Manifest(**{"step": step, "identity": identity, "layout": layout, "files": files, **changes}).write(checkpoint)
    return checkpoint
