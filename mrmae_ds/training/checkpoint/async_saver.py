"""One stage's checkpoints, written while the run waits, or in the background.

In the background a copy of this rank's part is made in memory, and a thread writes it while training goes on. Only the
writing is in the thread; all that processes agree on, the commit above all, happens between two steps, when all of them
know that all threads are done (:mod:`mrmae_ds.training.step_sync`). Until then the checkpoint does not exist, and the
one before it stays. What it costs is memory for the copy, and that a checkpoint is committed some steps later than its
state was taken.
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
from mrmae_ds.training.checkpoint.save import Snapshot, Written, commit, take_snapshot, write_shards
from mrmae_ds.training.checkpoint.train_state import TrainState

Committed = Callable[[Path, int, ResultValues], None]


class AsyncCheckpointer:
    """Writes the checkpoints of a running stage; see :func:`mrmae_ds.training.checkpoint.save.save_checkpoint`.

    Args:
        engine: what is saved.
        stage_dir: on a file system that all ranks share.
        identity: of the run. micro_batch: images a process takes at a time.
        retention: which older checkpoints stay.
        background: write in a thread.
        committed: is told folder, step and results of each checkpoint once it is whole.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        stage_dir: Path,
        identity: RunIdentity,
        retention: Retention,
        micro_batch: int,
        background: bool,
        committed: Committed,
    ) -> None:
        self.engine, self.stage_dir, self.identity = engine, stage_dir, identity
        self.retention, self.micro_batch, self.background = retention, micro_batch, background
        self.committed = committed
        self._open: _Writer | None = None

    def save(self, state: TrainState, results: ResultValues) -> None:
        """Write a checkpoint, or begin to. All ranks must call it.

        Raises:
            CollectiveError: on every rank, if this one or the one before could not be written.
        """
        self.finish()
        snapshot = take_snapshot(self.engine, self.stage_dir, state, self.identity, results, self.micro_batch)
        if self.background:
            self._open = _Writer(replace(snapshot, parts=copied(snapshot.parts)))
            self._open.start()
        else:
            self._commit(snapshot, write_shards(snapshot))

    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._open is not None and self._open.is_alive()

    def poll(self, any_writing: bool) -> None:
        """Commit what was written in the background, once no rank is writing. All ranks must call it.

        Args:
            any_writing: what all ranks agreed on: whether :meth:`writing` is true on one of them.
        """
        if self._open is not None and not any_writing:
            self.finish()

    def finish(self) -> None:
        """Wait for the thread and commit. All ranks must call it; nothing to do if nothing is being written.

        Raises:
            CollectiveError: on every rank, if one of them could not write.
        """
        writer, self._open = self._open, None
        if writer is not None:
            writer.join()
            self._commit(writer.snapshot, writer.written)

    def _commit(self, snapshot: Snapshot, written: Written) -> None:
        folder = commit(snapshot, written, self.retention)
        self.committed(folder, snapshot.manifest.step, snapshot.manifest.results)


class _Writer(threading.Thread):
    """Writes a rank's part; ``written`` tells how it went."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.snapshot = snapshot
        self.written = Written({}, "the thread that was to write ended early")

    def run(self) -> None:
        """See :func:`write_shards`."""
        self.written = write_shards(self.snapshot)


def copied(part: Any) -> Any:
    """A copy whose tensors are the CPU's and share nothing with the original's; what else there is, is shared."""
    if isinstance(part, Tensor):
        return part.detach().to("cpu", copy=True)
    if isinstance(part, dict):
        same = copy.copy(part)  # the kind of dictionary, and what torch hangs on to it
        same.update({key: copied(value) for key, value in part.items()})
        return same
    if isinstance(part, (list, tuple)) and not isinstance(part, torch.Size):
        return type(part)(copied(value) for value in part)
    return part
