"""Initialization of a pre-training's modules, as the public code of each kind of encoder does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from mrmae_ds.models.beit import MaskedBeit
from mrmae_ds.models.encoders import Encoder
from mrmae_ds.models.vit import MaskedViT

STD = 0.02
Fill = Callable[[Tensor], Tensor]


def init_pretraining(model: nn.Module, encoder: Encoder, decoder: nn.Module | None) -> None:
    """Initialize linear layers (biases 0), the token projection, and class and mask tokens.

    As MAE's and MCMAE's code: linear layers and token projection Xavier uniform, tokens N(0, 0.02). For a ViT with
    learned positions as MaskFeat's: linear layers and tokens N(0, 0.02), the token projection by torch's default. For
    a BEiT as BEiT's, data2vec's, FD's and SimMIM's: all of them N(0, 0.02) cut at 0.02, the token projection's bias 0;
    the last projections of attention and MLP in block i, from 1, are divided by the root of 2 i. Heads are linear
    layers, too, though those of FD's and SimMIM's code keep torch's default, as other convolutions do here.

    Args:
        model: all modules that are trained, with the heads.
        encoder: the one in ``model``.
        decoder: the one in ``model``, if there is any.
    """
    projection = encoder.token_projection
    fill_linear: Fill = nn.init.xavier_uniform_
    fill_projection: Fill | None = _xavier_of_patches
    fill_token: Fill = _normal
    if isinstance(encoder, MaskedBeit):
        fill_linear = fill_projection = fill_token = _cut_normal
        assert projection.bias is not None
        nn.init.zeros_(projection.bias)
    elif isinstance(encoder, MaskedViT) and encoder.spec.positions == "learned":
        fill_linear, fill_projection = _normal, None
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fill_linear(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if fill_projection is not None:
        fill_projection(projection.weight)
    for owner, name in ((encoder, "cls_token"), (encoder, "mask_token"), (decoder, "mask_token")):
        if (token := getattr(owner, name, None)) is not None:
            fill_token(token)
    if isinstance(encoder, MaskedBeit):
        encoder.fix_init_weight()


_normal = partial(nn.init.normal_, std=STD)
# Its deviation is 0.54 of that of the normal distribution that is cut.
_cut_normal = partial(nn.init.trunc_normal_, std=STD, a=-STD, b=STD)


def _xavier_of_patches(weight: Tensor) -> Tensor:
    return nn.init.xavier_uniform_(weight.data.view(weight.shape[0], -1))
