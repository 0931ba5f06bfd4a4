"""The order of samples: complete, independent of ranks, and exact at any count."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mrmae_ds.data.loaders.sampler import epoch_permutation, eval_order, steps_per_epoch, train_order
from mrmae_ds.errors import UserError


def test_steps_are_whole_global_batches() -> None:
    assert steps_per_epoch(100, 16) == 6
    assert steps_per_epoch(16, 16) == 1


def test_data_set_smaller_than_a_global_batch_is_an_error() -> None:
    with pytest.raises(UserError, match="15 samples, fewer than one global batch of 16"):
        steps_per_epoch(15, 16)


def test_permutation_is_philox_output_sorted() -> None:
    raw = np.random.Philox(key=np.array([3, 5], dtype=np.uint64)).random_raw(200).tolist()
    assert epoch_permutation(200, 3, 5).tolist() == sorted(range(200), key=raw.__getitem__)


def test_permutation_never_changes() -> None:
    # Literal values: resumed runs depend on them, under any version of numpy.
    assert epoch_permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("seed, epoch", [(3, 6), (4, 5), (5, 3)])
def test_epoch_and_seed_change_the_order(seed: int, epoch: int) -> None:
    assert (epoch_permutation(200, 3, 5) != epoch_permutation(200, seed, epoch)).mean() > 0.9


@pytest.mark.parametrize("batch, accumulation, ranks", [(8, 1, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (1, 2, 4)])
def test_train_order_follows_the_rule(batch: int, accumulation: int, ranks: int) -> None:
    order, total = epoch_permutation(100, 1, 2), batch * accumulation * ranks
    for rank in range(ranks):
        mine = train_order(
            100, seed=1, epoch=2, micro_batch=batch, accumulation=accumulation, world_size=ranks, rank=rank
        )
        expected = []
        for step, micro in itertools.product(range(100 // total), range(accumulation)):
            start = step * total + micro * ranks * batch + rank * batch
            expected.append(order[start : start + batch].tolist())
        assert mine.tolist() == expected


def test_samples_of_a_step_do_not_depend_on_ranks() -> None:
    def steps(batch: int, accumulation: int, ranks: int) -> list[set[int]]:
        shares = [
            train_order(
                100,
                seed=1,
                epoch=0,
                micro_batch=batch,
                accumulation=accumulation,
                world_size=ranks,
                rank=rank,
            )
            for rank in range(ranks)
        ]
        together = np.stack(shares, axis=1).reshape(-1, 24)
        return [set(step.tolist()) for step in together]

    one = steps(24, 1, 1)
    assert len(one) == 4 and all(len(step) == 24 for step in one)
    assert steps(4, 2, 3) == steps(3, 4, 2) == steps(12, 2, 1) == one


@pytest.mark.parametrize("count", [1, 3, 7, 16, 17, 33])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_eval_order_takes_each_sample_once(count: int, ranks: int) -> None:
    shares = [eval_order(count, batch=4, world_size=ranks, rank=rank) for rank in range(ranks)]
    assert len({rows.shape for rows, _ in shares}) == 1
    counted = np.concatenate([rows[valid] for rows, valid in shares])
    assert sorted(counted.tolist()) == list(range(count))
    assert all(((rows >= 0) & (rows < count)).all() for rows, _ in shares)


def test_empty_evaluation_set_is_an_error() -> None:
    with pytest.raises(UserError, match="empty"):
        eval_order(0, batch=4, world_size=1, rank=0)
