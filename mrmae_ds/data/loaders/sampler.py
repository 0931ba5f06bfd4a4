"""Which samples are seen when, as pure functions: nothing to save, and nothing that depends on how a run is
spread.

Letters: N samples in the set, G global batch (samples an optimizer step), b micro-batch, A micro-steps a
step, W ranks; G = b * A * W.
"""

from __future__ import annotations

import numpy as np

from mrmae_ds.data.types import BoolArray, IntArray
from mrmae_ds.errors import UserError


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Whole optimizer steps in an epoch, N // G; what is left over sits out this epoch.

    Raises UserError if the set is smaller than one global batch.
    """
    if global_batch < 1:
        raise UserError(f"the global batch must be at least 1, not {global_batch}")
    if num_samples < global_batch:
        raise UserError(
            f"the data set has {num_samples} samples, fewer than one global batch of {global_batch}: "
            "lower the batch or use more data"
        )
    return num_samples // global_batch


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> IntArray:
    """The order of one training epoch, a permutation of 0..N-1, int64 [N].

    Sorting Philox's raw output, which numpy keeps the same for good, and not ``Generator.permutation``, which
    it may
    change between releases: a run can be resumed under another numpy.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_samples)
    return np.argsort(keys, kind="stable")


def train_order(
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    rank: int,
) -> IntArray:
    """The samples of one rank in one training epoch, int64 [steps * A, b], a row a micro-step.

    Step s, micro-step m, rank r takes ``order[s*G + m*W*b + r*b :][:b]``, so the G samples of a step are the
    same whatever W, A and b are.

    Raises UserError if the set is smaller than one global batch.
    """
    global_batch = micro_batch * accumulation * world_size
    steps = steps_per_epoch(num_samples, global_batch)
    order = epoch_permutation(num_samples, seed, epoch)[: steps * global_batch]
    return order.reshape(steps * accumulation, world_size, micro_batch)[:, rank].copy()


def eval_order(num_samples: int, *, batch: int, world_size: int, rank: int) -> tuple[IntArray, BoolArray]:
    """The samples of one rank in an evaluation: each sample once over all ranks, as many batches on every
    rank.

    Returns (rows, valid): int64 and bool [ceil(N / (W * b)), b]. Where ``valid`` is False the row is a repeat
    that fills the batch and is not to be counted.

    Raises UserError if there is no sample.
    """
    if num_samples < 1:
        raise UserError("the data set to evaluate on is empty")
    batches = -(-num_samples // (batch * world_size))
    places = np.arange(batches * world_size * batch).reshape(batches, world_size, batch)[:, rank]
    return places % num_samples, places < num_samples
