"""Saving a stage's checkpoints in the foreground, or in the background while training continues.

In the background a copy of this rank's shards is made in memory, and a thread writes it. Only the writing is in the
thread; every collective operation, the commit above all, runs between two steps, once all ranks know that all threads
have ended (:mod:`mrmae_ds.training.step_sync`). Until then the checkpoint does not exist, and the one before it stays.
The cost is memory for the copy, and a commit some steps after the state was taken.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from mrmae_ds.training.checkpoint.folder import Retention
from mrmae_ds.training.checkpoint.manifest import ResultValues, RunIdentity
from mrmae_ds.training.checkpoint.save import Snapshot, WriteResult, commit, take_snapshot, write_shards
from mrmae_ds.training.checkpoint.train_state import TrainState

OnCommit = Callable[[Path, int, ResultValues], None]


class AsyncCheckpointer:
    """Writes the checkpoints of a running stage.

    Args:
        engine: to save.
        stage_dir: on a file system that all ranks share.
        identity: of the run.
        retention: of older checkpoints.
        micro_batch: images a rank takes at a time.
        background: write in a thread.
        committed: called with folder, step and results of each checkpoint once it is committed.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        stage_dir: Path,
        identity: RunIdentity,
        retention: Retention,
        micro_batch: int,
        background: bool,
        committed: OnCommit,
    ) -> None:
        self.engine, self.stage_dir, self.identity = engine, stage_dir, identity
        self.retention, self.micro_batch, self.background = retention, micro_batch, background
        self.committed = committed
        self._open: _WriterThread | None = None

    def save(self, state: TrainState, results: ResultValues) -> None:
        """Write a checkpoint, or start writing it. All ranks must call it.

        Args:
            state: this rank's counters.
            results: of the run so far.

        Raises:
            CollectiveError: on every rank, if this one or the one before could not be written.
        """
        self.finish()
        snapshot = take_snapshot(self.engine, self.stage_dir, state, self.identity, results, self.micro_batch)
        if self.background:
            self._open = _WriterThread(replace(snapshot, shards=copy_to_cpu(snapshot.shards)))
            self._open.start()
        else:
            self._commit(snapshot, write_shards(snapshot))

    def writing(self) -> bool:
        """Return True if this rank's thread is writing."""
        return self._open is not None and self._open.is_alive()

    def poll(self, any_writing: bool) -> None:
        """Commit what was written in the background, once no rank is writing. All ranks must call it.

        Args:
            any_writing: True if :meth:`writing` is true on any rank; the same on all ranks.
        """
        if self._open is not None and not any_writing:
            self.finish()

    def finish(self) -> None:
        """Wait for the thread and commit; do nothing if nothing is being written. All ranks must call it.

        Raises:
            CollectiveError: on every rank, if one of them could not write.
        """
        writer, self._open = self._open, None
        if writer is not None:
            writer.join()
            self._commit(writer.snapshot, writer.result)

    def _commit(self, snapshot: Snapshot, written: WriteResult) -> None:
        folder = commit(snapshot, written, self.retention)
        self.committed(folder, snapshot.manifest.step, snapshot.manifest.results)


class _WriterThread(threading.Thread):
    """Writes a rank's shards.

    Attributes:
        result: of the writing, once the thread has ended.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.snapshot = snapshot
        self.result = WriteResult({}, "the writing thread ended early")

    def run(self) -> None:
        """Write the shards."""
        self.result = write_shards(self.snapshot)


def copy_to_cpu(shard: Any) -> Any:
    """Copy a nested structure. Tensors are copied to the CPU and share no memory; other objects are shared.

    From CUDA the copies go into pinned memory, which torch keeps for the next call, and the host waits once.
    """
    copied = _copy(shard)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(shard: Any) -> Any:
    if isinstance(shard, Tensor):
        return shard.detach().to("cpu", copy=True, non_blocking=shard.is_cuda)
    if isinstance(shard, dict):
        result = copy.copy(shard)  # keeps the type of dictionary, and the attributes that torch sets on it
        result.update({key: _copy(value) for key, value in shard.items()})
        return result
    if isinstance(shard, (list, tuple)) and not isinstance(shard, torch.Size):
        return type(shard)(_copy(value) for value in shard)
    return shard
