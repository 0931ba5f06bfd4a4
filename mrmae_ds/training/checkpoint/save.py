"""Writing a checkpoint so that at every moment, whoever is killed, the newest committed one is whole.

    1. every process takes its part of the state: what DeepSpeed would write, and
       :mod:`mrmae_ds.training.checkpoint.train_state`
    2. every process writes its files into checkpoints/.saving-TAG, takes their SHA-256 on the way, and flushes them
    3. all tell each other how it went; if one failed, what was written goes and all raise
    4. rank 0 writes the manifest, flushes it, renames the folder to its tag, flushes that, replaces the pointer
    5. rank 0 removes what is not kept

DeepSpeed would write from within its collective operations, so that a full disk on one rank leaves the others waiting;
here it only hands over what is to be written.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from mrmae_ds.distributed.collectives import broadcast_object, gather, raise_on_all_ranks
from mrmae_ds.errors import CollectiveError
from mrmae_ds.files import file_sha256, flush_folder, write_text
from mrmae_ds.training.checkpoint import folder as store
from mrmae_ds.training.checkpoint.files import told, write_shard
from mrmae_ds.training.checkpoint.manifest import EngineLayout, FileEntry, Manifest, ResultValues, RunIdentity
from mrmae_ds.training.checkpoint.train_state import TrainState, state_file

logger = logging.getLogger(__name__)
Parts = dict[str, Any]  # by file name, what torch.save gets


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint that is being made.

    Attributes:
        stage_dir: of the run. tag: of the checkpoint.
        parts: this rank's files.
        manifest: without the files; rank 0's is the one that counts.
        shards: files of optimizer state that all ranks together must have.
    """

    stage_dir: Path
    tag: str
    parts: Parts
    manifest: Manifest
    shards: int

    @property
    def staging(self) -> Path:
        """Where the files are written."""
        return self.stage_dir / store.FOLDER / f"{store.SAVING}{self.tag}" / self.tag

    @property
    def final(self) -> Path:
        """What the folder is renamed to."""
        return self.stage_dir / store.FOLDER / self.tag


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    stage_dir: Path,
    state: TrainState,
    *,
    identity: RunIdentity,
    results: ResultValues,
    retention: store.Retention,
    micro_batch: int,
) -> Path:
    """Write a checkpoint of the present state and remove those that are not kept. All ranks must call it.

    Args:
        engine: between two optimizer steps.
        stage_dir: on a file system that all ranks share.
        state: this rank's counters.
        identity: of the run. results: so far.
        retention: which older checkpoints stay.
        micro_batch: images a process takes at a time.

    Returns:
        The checkpoint's folder, on every rank.

    Raises:
        CollectiveError: on every rank, if it could not be written on one. The earlier checkpoints are as they were.
    """
    snapshot = take_snapshot(engine, stage_dir, state, identity, results, micro_batch)
    return commit(snapshot, write_shards(snapshot), retention)


def take_snapshot(
    engine: deepspeed.DeepSpeedEngine,
    stage_dir: Path,
    state: TrainState,
    identity: RunIdentity,
    results: ResultValues,
    micro_batch: int,
) -> Snapshot:
    """Collect this rank's part and make the folder to write into; see :func:`save_checkpoint`. All ranks call it.

    The parts hold the engine's own tensors: they must be written, or copied, before the next step.
    """
    tag, error = broadcast_object(_made_folder(stage_dir, state.step) if dist.get_rank() == 0 else ("", None))
    if error is not None:
        raise CollectiveError(f"the checkpoint after step {state.step} was not begun: {error}")
    layout = layout_of(engine)
    snapshot = Snapshot(
        stage_dir=stage_dir,
        tag=tag,
        parts={},
        manifest=Manifest(step=state.step, identity=identity, layout=layout, results=dict(results), files={}),
        shards=layout.world_size if layout.zero_stage > 0 else 0,
    )
    device = torch.device(engine.device)
    snapshot.parts.update(engine_shards(engine, snapshot.staging))
    snapshot.parts[state_file(dist.get_rank())] = state.to_save(engine.module, micro_batch, device)
    return snapshot


def _made_folder(stage_dir: Path, step: int) -> tuple[str, str | None]:
    """A new tag, and the folder to write it into; or what is in the way."""
    folder = stage_dir / store.FOLDER
    try:
        store.clear_leftovers(stage_dir)
        tag = store.new_tag(stage_dir, step)
        (folder / f"{store.SAVING}{tag}" / tag).mkdir(parents=True)
    except OSError as error:
        return "", told(error, folder)
    return tag, None


def layout_of(engine: deepspeed.DeepSpeedEngine) -> EngineLayout:
    """How an engine's state is spread over the ranks' files."""
    zero = engine.zero_optimization_stage()
    return EngineLayout(
        world_size=dist.get_world_size(),
        zero_stage=zero,
        dtype="bfloat16" if engine.bfloat16_enabled() else "float32",
        sub_group_size=int(engine.zero_sub_group_size()) if zero == 3 else 0,
    )


class _Collector(CheckpointEngine):
    """Stands in for DeepSpeed's writer, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is there."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep it."""
        self.parts[path] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """Not for loading."""
        raise NotImplementedError

    def commit(self, info: Any) -> bool:
        """Nothing to do."""
        return True


def engine_shards(engine: deepspeed.DeepSpeedEngine, folder: Path) -> Parts:
    """What DeepSpeed's ``save_checkpoint`` would write into ``folder`` on this rank. All ranks must call it."""
    collector, own = _Collector(), engine.checkpoint_engine
    engine.checkpoint_engine = collector
    # Rank 0 would copy two scripts to the disk from within; they come with DeepSpeed anyway.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script
    return {os.path.relpath(path, folder): part for path, part in collector.parts.items()}


@dataclass(frozen=True)
class Written:
    """How this rank's writing went: its files, or what went wrong."""

    files: dict[str, FileEntry]
    error: str | None = None


def write_shards(snapshot: Snapshot) -> Written:
    """Write this rank's files and see them on the disk. Involves no other rank, and raises nothing."""
    files = {}
    for name, part in snapshot.parts.items():
        path = snapshot.staging / name
        try:
            files[name] = write_shard(path, part)
        except Exception as error:
            return Written({}, told(error, path))
    return Written(files)


def commit(snapshot: Snapshot, written: Written, retention: store.Retention) -> Path:
    """Make a checkpoint of what all ranks have written; see :func:`save_checkpoint`. All ranks must call it.

    Raises:
        CollectiveError: on every rank, if one of them could not write.
    """
    reports = gather(written)
    first, error = dist.get_rank() == 0, written.error
    if first and all(report.error is None for report in reports):
        try:
            _put_in_place(snapshot, {name: entry for report in reports for name, entry in report.files.items()})
        except Exception as raised:
            error = told(raised, snapshot.final)
    try:
        step = snapshot.manifest.step
        raise_on_all_ranks(
            error, f"the checkpoint after step {step} was not saved, the earlier ones are as they were: "
        )
    except CollectiveError:
        if first:
            shutil.rmtree(snapshot.staging.parent, ignore_errors=True)
        raise
    if first:
        _tidy(snapshot, retention)
    dist.barrier()
    return snapshot.final


def _put_in_place(snapshot: Snapshot, files: dict[str, FileEntry]) -> None:
    """Check what was written, describe it, and give it its name."""
    staging, folder = snapshot.staging, snapshot.final.parent
    for path in sorted(staging.rglob("*")):  # what DeepSpeed copied there itself: parameters that live on NVMe
        name = path.relative_to(staging).as_posix()
        if path.is_file() and name not in files:
            files[name] = FileEntry(size=path.stat().st_size, sha256=file_sha256(path))
    shards = sum(name.endswith("optim_states.pt") for name in files)
    if shards != snapshot.shards or not files or not all(entry.size for entry in files.values()):
        raise ValueError(f"{shards} optimizer shards of {snapshot.shards}, or an empty file: {sorted(files)}")
    snapshot.manifest.model_copy(update={"files": files}).write(staging)
    flush_folder(staging)
    staging.rename(snapshot.final)
    staging.parent.rmdir()
    flush_folder(folder)


def _tidy(snapshot: Snapshot, retention: store.Retention) -> None:
    """The pointer, and what goes. The checkpoint is whole whatever becomes of them, so a failure is only told."""
    try:
        write_text(snapshot.final.with_name(store.POINTER), snapshot.tag)
        store.prune(snapshot.stage_dir, snapshot.final, retention)
    except OSError as error:
        logger.warning("%s is saved, but %s", snapshot.final, told(error, snapshot.final.parent))
