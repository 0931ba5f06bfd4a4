"""Block-wise masks against masks and frequencies of the authors' public code (tests/fixtures/block_masks.npz)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mrmae_ds.config.stages import MaskingConfig
from mrmae_ds.errors import ConfigError
from mrmae_ds.models.block_masking import block_mask, block_masks
from mrmae_ds.training.tasks.base import MicroBatchKey
from tests.fixtures import FOLDER

GRID = (14, 14)
# masked, min_block, max_block, exact, and the mean count over 20,000 draws (CAE: 5,000).
RULES = {
    "beit_75_min16": ((75, 16, 75, False), 74.473),
    "data2vec_120_min16_max196": ((120, 16, 196, False), 119.528),
    "maskfeat_78_min15": ((78, 15, 78, False), 77.554),
    "cae_98_min16_exact": ((98, 16, 98, True), 98.0),
}


@pytest.mark.parametrize("rule", RULES)
def test_masks_are_the_authors(rule: str) -> None:
    """The same generator, asked in the same order, gives the same 64 masks."""
    rng, values = random.Random(0), RULES[rule][0]
    found = [np.packbits(block_mask(rng, GRID, *values).ravel()) for _ in range(64)]
    with np.load(FOLDER / "block_masks.npz") as file:
        assert np.array_equal(np.stack(found), file[rule])


@pytest.mark.parametrize("rule", RULES)
def test_frequencies_are_the_authors(rule: str) -> None:
    (masked, min_block, max_block, exact), mean = RULES[rule]
    masks = block_masks(range(12_000), GRID, masked, min_block, max_block, exact).unflatten(1, GRID).float()
    assert masks.sum((1, 2)).mean().item() == pytest.approx(mean, abs=0.05)
    with np.load(FOLDER / "block_masks.npz") as file:
        # CAE's frequencies are of a quarter of the draws.
        bound = 0.03 if exact else 0.02
        assert np.abs(masks.mean(0).numpy() - file[f"{rule}/cells"]).max() < bound
    if rule == "beit_75_min16":
        equal = [(masks[:, 1:] == masks[:, :-1]), (masks[:, :, 1:] == masks[:, :, :-1])]
        assert torch.stack([part.float().mean() for part in equal]).mean().item() == pytest.approx(0.890, abs=0.005)


@pytest.mark.parametrize("exact", [False, True])
def test_blocks_that_do_not_fit_are_refused(exact: bool) -> None:
    """A block is lower and narrower than the grid: 7x7 of 8x8 tokens at most; exact draws would not end."""
    for min_block in (40, 64):
        masking = MaskingConfig(mode="block", masked=min_block, min_block=min_block, exact=exact)
        with pytest.raises(ConfigError, match=rf"{min_block}: of 8x(8|9) tokens, most draws of such a block"):
            masking.grid((8, 8) if min_block < 64 else (8, 9), 4)
    assert MaskingConfig(mode="block", masked=40, min_block=16, exact=exact).grid((8, 8), 4) == (8, 8)


def test_an_image_has_the_same_mask_on_any_number_of_ranks_and_another_in_the_next_step() -> None:
    masking = MaskingConfig(mode="block", masked=24, min_block=5)

    def drawn(step: int, world_size: int, accumulation: int) -> torch.Tensor:
        size = 8 // (world_size * accumulation)
        keys = [
            MicroBatchKey(3, step, index, rank, world_size, size)
            for index in range(accumulation)
            for rank in range(world_size)
        ]
        return torch.cat([masking.draw_blocks(key.image_seeds("mask"), (8, 8)) for key in keys])

    one = drawn(5, 1, 1)
    for ranks, accumulation in ((2, 1), (1, 4), (2, 2)):
        assert torch.equal(one, drawn(5, ranks, accumulation))
    assert len({tuple(row.tolist()) for row in one}) == 8
    assert not torch.equal(one, drawn(6, 1, 1))
