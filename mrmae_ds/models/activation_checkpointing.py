"""Activation checkpointing of a stack of blocks: plain torch, no distributed code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mrmae_ds.models.masking import VisibleSet


@dataclass
class CheckpointPlan:
    """Which blocks of each part recompute their activations in backward: every n-th; 0 none, 1 all."""

    conv_stages: int = 0
    transformer: int = 0
    decoder: int = 0


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    every: int,
    visible: VisibleSet | None = None,
    collect: list[Tensor] | None = None,
) -> Tensor:
    """Run blocks in order, [B, ...] to the same shape.

    Args:
        blocks: modules of one tensor, or of a tensor and a visible set.
        x: the first block's input.
        every: block i is checkpointed if i is a multiple of this; 0 checkpoints none.
        visible: handed to every block if given.
        collect: each block's output is appended to it if given.
    """
    extra = () if visible is None else (visible,)
    for i, block in enumerate(blocks):
        if every and i % every == 0 and block.training:
            # Non-reentrant: the reentrant kind gives no gradients where no input needs one (the first stage).
            x = checkpoint(block, x, *extra, use_reentrant=False)
        else:
            x = block(x, *extra)
        if collect is not None:
            collect.append(x)
    return x
