"""Writing a checkpoint so that the newest committed one is complete at every moment, whichever process is killed.

1. every rank collects its shards: the files that DeepSpeed would write, and
   :mod:`mrmae_ds.training.checkpoint.train_state`
2. every rank writes them into checkpoints/.saving-TAG, computes their SHA-256 on the way, and flushes them
3. the ranks exchange the results; if one failed, the files are removed and all ranks raise
4. rank 0 writes the manifest, flushes it, renames the folder to its tag, flushes that, replaces the pointer
5. rank 0 removes the checkpoints that are not kept

DeepSpeed would write from within its collective operations, so a full disk on one rank would leave the others waiting;
here it only hands over its tensors.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch.utils.serialization import config

from mrmae_ds.distributed.collectives import broadcast_object, gather, raise_on_all_ranks
from mrmae_ds.errors import CollectiveError
from mrmae_ds.files import file_sha256, flush_folder, write_text
from mrmae_ds.training.checkpoint import folder as store
from mrmae_ds.training.checkpoint.manifest import EngineLayout, FileEntry, Manifest, ResultValues, RunIdentity
from mrmae_ds.training.checkpoint.train_state import TrainState, state_file

logger = logging.getLogger(__name__)
Shards = dict[str, Any]  # file name -> the object to write with torch.save


@dataclass(frozen=True)
class Snapshot:
    """One rank's shards of a checkpoint that is being made.

    Attributes:
        stage_dir: of the run.
        tag: name of the checkpoint.
        shards: this rank's files.
        manifest: without the files; rank 0's is written.
        optimizer_files: number of files of optimizer state that all ranks together must write.
    """

    stage_dir: Path
    tag: str
    shards: Shards
    manifest: Manifest
    optimizer_files: int

    @property
    def staging(self) -> Path:
        """The folder that the files are written into."""
        return self.stage_dir / store.FOLDER / f"{store.SAVING}{self.tag}" / self.tag

    @property
    def final(self) -> Path:
        """The folder after the commit."""
        return self.stage_dir / store.FOLDER / self.tag


@dataclass(frozen=True)
class WriteResult:
    """Result of writing one rank's shards.

    Attributes:
        files: by name, empty after an error.
        error: its message, None if all is written.
    """

    files: dict[str, FileEntry]
    error: str | None = None


def take_snapshot(
    engine: deepspeed.DeepSpeedEngine,
    stage_dir: Path,
    state: TrainState,
    identity: RunIdentity,
    results: ResultValues,
    micro_batch: int,
) -> Snapshot:
    """Make the folder to write into and collect this rank's shards. All ranks must call it.

    The shards hold the engine's own tensors: they must be written, or copied, before the next step.

    Args:
        engine: between two optimizer steps.
        stage_dir: on a file system that all ranks share.
        state: this rank's counters.
        identity: of the run.
        results: of the run so far.
        micro_batch: images a rank takes at a time.

    Raises:
        CollectiveError: on every rank, if the folder cannot be made.
    """
    tag, error = broadcast_object(_make_staging(stage_dir, state.step) if dist.get_rank() == 0 else ("", None))
    if error is not None:
        raise CollectiveError(f"the checkpoint after step {state.step} was not begun: {error}")
    layout = layout_of(engine)
    snapshot = Snapshot(
        stage_dir=stage_dir,
        tag=tag,
        shards={},
        manifest=Manifest(step=state.step, identity=identity, layout=layout, results=dict(results), files={}),
        optimizer_files=layout.world_size if layout.zero_stage > 0 else 0,
    )
    device = torch.device(engine.device)
    snapshot.shards.update(engine_shards(engine, snapshot.staging))
    snapshot.shards[state_file(dist.get_rank())] = state.to_save(engine.module, micro_batch, device)
    return snapshot


def _make_staging(stage_dir: Path, step: int) -> tuple[str, str | None]:
    """Return a new tag, its staging folder made; or the error."""
    folder = stage_dir / store.FOLDER
    try:
        store.clear_leftovers(stage_dir)
        tag = store.new_tag(stage_dir, step)
        (folder / f"{store.SAVING}{tag}" / tag).mkdir(parents=True)
    except OSError as error:
        return "", describe_error(error, folder)
    return tag, None


def layout_of(engine: deepspeed.DeepSpeedEngine) -> EngineLayout:
    """Return how an engine's state is spread over the ranks' files."""
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
        self.shards: Shards = {}

    def create(self, info: Any) -> None:
        """Do nothing: there is nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: the folder exists."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep the object."""
        self.shards[path] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """Refuse: this engine is not for loading."""
        raise NotImplementedError

    def commit(self, info: Any) -> bool:
        """Report success."""
        return True


def engine_shards(engine: deepspeed.DeepSpeedEngine, folder: Path) -> Shards:
    """Return what DeepSpeed's ``save_checkpoint`` would write into ``folder`` on this rank. All ranks must call it."""
    collector, own = _Collector(), engine.checkpoint_engine
    engine.checkpoint_engine = collector
    # Rank 0 would copy two scripts to the disk from within; they come with DeepSpeed anyway.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script
    return {os.path.relpath(path, folder): shard for path, shard in collector.shards.items()}


# ---- writing


def write_shards(snapshot: Snapshot) -> WriteResult:
    """Write this rank's files and flush them. Involves no other rank, and raises nothing."""
    files = {}
    for name, shard in snapshot.shards.items():
        path = snapshot.staging / name
        try:
            files[name] = write_shard(path, shard)
        except Exception as error:
            return WriteResult({}, describe_error(error, path))
    return WriteResult(files)


def write_shard(path: Path, shard: Any) -> FileEntry:
    """Write an object with ``torch.save`` and flush the file.

    Args:
        path: of the file; its folder is made.
        shard: the object.

    Raises:
        OSError: the file system's own, which torch hides.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            with _save_options():
                torch.save(shard, cast(IO[bytes], hashing))  # torch calls write and flush alone
            file.flush()
            os.fsync(file.fileno())
        except Exception as error:
            raise hashing.error or error from None
    return FileEntry(size=hashing.size, sha256=hashing.digest.hexdigest())


class _HashingFile:
    """A file that computes the SHA-256 of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and count; an error is kept, because torch hides it."""
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def _save_options() -> Any:
    """Return a context in which torch saves fast.

    Tensors come from CUDA through pinned memory. Torch's own checksums are off: nothing reads them, and they take as
    long as the SHA-256 that replaces them.
    """
    options = {"save.use_pinned_memory_for_d2h": True, "save.compute_crc32": False}
    return config.patch(options)  # type: ignore[attr-defined]  # torch adds it to the module


def describe_error(error: Exception, path: Path) -> str:
    """Describe an error of writing ``path``, with a fix where there is one."""
    if not isinstance(error, OSError):
        return f"{path}: {error or type(error).__name__}"
    fixes = {
        errno.ENOSPC: "free space there, or keep fewer checkpoints (checkpoint.keep_last)",
        errno.EDQUOT: "your quota is used up; keep fewer checkpoints (checkpoint.keep_last)",
        errno.EACCES: "make the folder writable",
        errno.EROFS: "make the file system writable",
    }
    fix = fixes.get(error.errno or 0)
    return f"{error.filename or path}: {error.strerror or error}" + (f"; {fix}" if fix else "")


# ---- committing


def commit(snapshot: Snapshot, written: WriteResult, retention: store.Retention) -> Path:
    """Make a checkpoint of what all ranks have written. All ranks must call it.

    Args:
        snapshot: this rank's.
        written: result of :func:`write_shards`.
        retention: of older checkpoints.

    Returns:
        The checkpoint's folder, on every rank.

    Raises:
        CollectiveError: on every rank, if one of them could not write. The earlier checkpoints are as they were.
    """
    results = gather(written)
    first, error = dist.get_rank() == 0, written.error
    if first and all(result.error is None for result in results):
        try:
            _put_in_place(snapshot, {name: entry for result in results for name, entry in result.files.items()})
        except Exception as raised:
            error = describe_error(raised, snapshot.final)
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
    """Check what was written, write the manifest, and rename the folder to its tag."""
    staging, folder = snapshot.staging, snapshot.final.parent
    for path in sorted(staging.rglob("*")):  # what DeepSpeed copied there itself: parameters that live on NVMe
        name = path.relative_to(staging).as_posix()
        if path.is_file() and name not in files:
            files[name] = FileEntry(size=path.stat().st_size, sha256=file_sha256(path))
    count = sum(name.endswith("optim_states.pt") for name in files)
    if count != snapshot.optimizer_files or not files or not all(entry.size for entry in files.values()):
        raise ValueError(f"{count} optimizer shards of {snapshot.optimizer_files}, or an empty file: {sorted(files)}")
    snapshot.manifest.model_copy(update={"files": files}).write(staging)
    flush_folder(staging)
    staging.rename(snapshot.final)
    staging.parent.rmdir()
    flush_folder(folder)


def _tidy(snapshot: Snapshot, retention: store.Retention) -> None:
    """Write the pointer and remove what is not kept. The checkpoint is complete either way, so an error only warns."""
    try:
        write_text(snapshot.final.with_name(store.POINTER), snapshot.tag)
        store.prune(snapshot.stage_dir, snapshot.final, retention)
    except OSError as error:
        logger.warning("%s is saved, but %s", snapshot.final, describe_error(error, snapshot.final.parent))
