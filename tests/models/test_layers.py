"""Patch convolutions as matrix products against conv2d."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mrmae_ds.models.layers import ConvBlock, PatchConv, PatchEmbed
from tests.support.reference import perturb


@pytest.mark.parametrize("patch", [1, 2, 7])
def test_patch_conv_is_the_strided_convolution(patch: int) -> None:
    layer = PatchConv(3, 5, patch)
    x = torch.randn(2, 3 * patch, 2 * patch, 3)
    expected = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, stride=patch).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_patch_conv_takes_any_leading_dimensions() -> None:
    layer = PatchConv(3, 5, 2)
    blocks = torch.randn(2, 4, 6, 6, 3)
    out = layer(blocks)
    assert out.shape == (2, 4, 3, 3, 5)
    torch.testing.assert_close(out[1, 2], layer(blocks[1:2, 2])[0], atol=1e-6, rtol=1e-5)


def test_patch_embed_norm_and_gelu() -> None:
    layer = PatchEmbed(3, 6, 2)
    perturb(layer, seed=0)
    projected = layer.proj(x := torch.randn(1, 4, 4, 3)).double()
    centerd = projected - projected.mean(-1, keepdim=True)
    normed = centerd / (centerd.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * layer.norm.weight.double() + layer.norm.bias.double()
    expected = normed * 0.5 * (1 + torch.erf(normed / 2**0.5))
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=1e-5)


def test_conv_block_keeps_the_released_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in ConvBlock(8, 4).named_parameters()}
    assert shapes["conv1.weight"] == (8, 8, 1, 1)
    assert shapes["attn.weight"] == (8, 1, 5, 5)
    assert shapes["mlp.fc1.weight"] == (32, 8, 1, 1)
    assert all(f"{name}.bias" in shapes for name in ("conv1", "conv2", "attn", "mlp.fc1", "mlp.fc2"))
