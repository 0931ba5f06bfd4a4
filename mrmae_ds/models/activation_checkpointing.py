"""Activation checkpointing of a stack of blocks, in plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mrmae_ds.models.masking import VisibleCells


@dataclass
class CheckpointPlan:
    """Blocks that recompute their activations in backward: every n-th of a part; 0 means none, 1 all.

    Attributes:
        conv_stages: interval in the convolutional stages.
        transformer: interval in the encoder's transformer blocks.
        decoder: interval in the decoder's blocks.
    """

    conv_stages: int = 0
    transformer: int = 0
    decoder: int = 0


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    every: int,
    second: VisibleCells | Tensor | None = None,
    collect: list[Tensor] | None = None,
) -> Tensor:
    """Run blocks in order.

    Args:
        blocks: modules that take a tensor, or a tensor and ``second``.
        x: input of the first block, [B, ...].
        every: block i is checkpointed if i is a multiple of this number; 0 checkpoints none.
        second: argument to pass to every block besides ``x``, such as visible cells or prompts.
        collect: list to append each block's output to.

    Returns:
        Output of the last block, of the shape of ``x``.
    """
    extra = () if second is None else (second,)
    for i, block in enumerate(blocks):
        if every and i % every == 0 and block.training:
            # Reentrant checkpointing computes no gradients where no input requires one (the first stage).
            x = checkpoint(block, x, *extra, use_reentrant=False)
        else:
            x = block(x, *extra)
        if collect is not None:
            collect.append(x)
    return x
