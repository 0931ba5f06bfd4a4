"""Moving average of an encoder, which is its own teacher (data2vec, Baevski et al. 2022).

It is a frozen part of the model that is trained: an engine partitions, saves and restores it like any frozen parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mrmae_ds.models.encoders import Encoder
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.models.objectives import normalize_target


class MovingAverage(nn.Module):
    """A copy of an encoder whose weights follow it, always in eval mode and without gradients.

    Args:
        encoder: the encoder with its initial weights.
        decay: share of the old average in an update, as a function of the epochs completed.
        layers: transformer blocks, 0-based, whose mean output is the target; empty is the last one.
        layer_norm: normalize each token of each of them first.
    """

    def __init__(
        self, encoder: Encoder, decay: Callable[[float], float], layers: Sequence[int] = (), layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.decay = decay
        self.network = copy.deepcopy(encoder).requires_grad_(False)
        self.layers = tuple(layers) or (len(encoder.transformer_blocks) - 1,)
        self.normalize = "layer_norm" if layer_norm else "none"
        super().train(False)

    def train(self, mode: bool = True) -> MovingAverage:
        """Do nothing: a teacher is always in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the mean of the layers' tokens, prefix tokens first, [B, P + L, C].

        Args:
            images: normalized images [B, 3, H, W], all of whose tokens are seen.
        """
        whole = VisibleSet.whole(len(images), self.network.grid, images.device)
        outputs = self.network(images, whole, self.layers)["blocks"]
        return torch.stack([normalize_target(tokens, self.normalize) for tokens in outputs]).mean(0)

    @torch.no_grad()
    def update(self, encoder: Encoder, epoch: float) -> None:
        """Move every weight towards the encoder's, after an optimizer step.

        Under ZeRO-3 each rank updates its own shares, so parameters must not stay gathered.

        Args:
            encoder: the trained encoder.
            epoch: epochs completed.
        """
        torch._foreach_lerp_(_shares(self.network), _shares(encoder), 1 - self.decay(epoch))


def _shares(module: nn.Module) -> list[Tensor]:
    """Return each parameter, or of one that ZeRO-3 has partitioned this rank's share, which gathers read."""
    return [getattr(parameter, "ds_tensor", parameter.data) for parameter in module.parameters()]
