"""The decoder: token order and spec."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mrmae_ds.models.decoder import Decoder, DecoderSpec
from mrmae_ds.models.masking import choose_visible
from tests.support.reference import perturb, random_noise


@pytest.mark.parametrize("prefix", [0, 1])
def test_mask_tokens_fill_in_where_tokens_were_removed(prefix: int) -> None:
    decoder = Decoder(DecoderSpec(dim=8, depth=2, num_heads=2), 6, (3, 3), prefix)
    perturb(decoder, seed=0)
    decoder.blocks = nn.ModuleList()  # what enters the blocks is then what enters the norm
    visible = choose_visible(random_noise(2, 9, seed=1), (3, 3), 0.34)
    latent = torch.randn(2, prefix + 3, 6)
    entered: list[torch.Tensor] = []
    decoder.norm.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    out = decoder(latent, visible)
    assert out.shape == (2, prefix + 9, 8)
    embedded = latent @ decoder.embed.weight.T + decoder.embed.bias
    for row in range(2):
        kept = visible.ids_keep[row].tolist()
        for token in range(9):
            content = embedded[row, prefix + kept.index(token)] if token in kept else decoder.mask_token[0, 0]
            expected = content + decoder.pos_embed[0, prefix + token]
            torch.testing.assert_close(entered[0][row, prefix + token], expected)
        if prefix:
            torch.testing.assert_close(entered[0][row, 0], embedded[row, 0])


def test_positions_are_fixed() -> None:
    decoder = Decoder(DecoderSpec(dim=8, depth=1, num_heads=2), 6, (3, 3), 0)
    assert [name for name, p in decoder.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_defaults_are_maes_and_wrong_widths_are_refused() -> None:
    spec = DecoderSpec()
    assert (spec.dim, spec.depth, spec.num_heads, spec.mlp_ratio) == (512, 8, 16, 4)
    with pytest.raises(ValidationError, match="multiple of 4"):
        DecoderSpec(dim=18)
