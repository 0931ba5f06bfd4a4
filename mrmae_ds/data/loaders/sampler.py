"""Deterministic sampling as pure functions of (seed, epoch, index).

There is no sampler state to save, and the result does not depend on the number of ranks.

Letters: N samples in the set, G global batch (samples an optimizer step), b micro-batch, A micro-steps a
step, W ranks; G = b * A * W.
"""

from __future__ import annotations

import numpy as np

from mrmae_ds.data.types import BoolArray, IntArray
from mrmae_ds.errors import UserError


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Return the number of whole optimizer steps in an epoch, N // G; the remainder is dropped (drop_last).

    Raises:
        UserError: if the set is smaller than one global batch.
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
    """Return the order of one training epoch, a permutation of 0..N-1, int64 [N].

    Philox's raw output is sorted instead of calling ``Generator.permutation``, because numpy guarantees only the former
    across releases: a run can be resumed under another numpy.
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
    """Return the samples of one rank in one training epoch.

    Rank r takes ``order[s*G + m*W*b + r*b :][:b]`` in micro-step m of step s, so the G samples of a step are the same
    for all W, A and b.

    Args:
        num_samples: N.
        seed: of the permutation.
        epoch: not negative.
        micro_batch: b.
        accumulation: A.
        world_size: W.
        rank: r.

    Returns:
        Rows in the data set, int64 [steps * A, b], one row per micro-step.

    Raises:
        UserError: if the set is smaller than one global batch.
    """
    global_batch = micro_batch * accumulation * world_size
    steps = steps_per_epoch(num_samples, global_batch)
    order = epoch_permutation(num_samples, seed, epoch)[: steps * global_batch]
    return order.reshape(steps * accumulation, world_size, micro_batch)[:, rank].copy()


def eval_order(num_samples: int, *, batch: int, world_size: int, rank: int) -> tuple[IntArray, BoolArray]:
    """Return the samples of one rank in an evaluation.

    Each sample occurs once over all ranks, and every rank has the same number of batches.

    Args:
        num_samples: N.
        batch: b.
        world_size: W.
        rank: this rank.

    Returns:
        Rows in the data set and validity, int64 and bool [ceil(N / (W * b)), b]. Where it is False, the row repeats a
        sample to fill the batch and does not count.

    Raises:
        UserError: if there is no sample.
    """
    if num_samples < 1:
        raise UserError("the data set to evaluate on is empty")
    batches = -(-num_samples // (batch * world_size))
    places = np.arange(batches * world_size * batch).reshape(batches, world_size, batch)[:, rank]
    return places % num_samples, places < num_samples
