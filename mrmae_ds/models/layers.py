"""Building blocks of the convolutional stages, channels last throughout: [..., height, width, C].

Parameter names and shapes are those of the released MCMAE files (1x1 convolutions keep their [out, in, 1, 1]).
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from mrmae_ds.models.masking import VisibleCells


class PatchConv(nn.Conv2d):
    """Convolution with kernel = stride = ``patch``, computed as one matrix product over patches.

    It accepts any leading dimensions, and so both whole maps and blocks of visible tokens.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        patch: side of the kernel in cells.
    """

    def __init__(self, in_channels: int, out_channels: int, patch: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=patch, stride=patch)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., S*patch, S*patch, in] to [..., S, S, out]; the two sides may differ."""
        p = self.patch
        if p > 1:
            x = x.unflatten(-2, (-1, p)).unflatten(-4, (-1, p)).transpose(-4, -3).flatten(-3)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Patch convolution, LayerNorm over channels (eps 1e-5), exact GELU."""

    def __init__(self, in_channels: int, out_channels: int, patch: int) -> None:
        super().__init__()
        self.proj = PatchConv(in_channels, out_channels, patch)
        self.norm = nn.LayerNorm(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., S*patch, S*patch, in] to [..., S, S, out]."""
        return F.gelu(self.norm(self.proj(x)))


class ConvMlp(nn.Module):
    """MLP of two 1x1 convolutions and an exact GELU on the channels of [..., C]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PatchConv(dim, hidden, 1)
        self.fc2 = PatchConv(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., C] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class ConvBlock(nn.Module):
    """MCMAE's (masked) convolution block.

    ``x + DropPath(conv2(dw5x5(M * conv1(LN(x)))))``, then ``x + DropPath(MLP(LN(x)))``. Only the depth-wise convolution
    mixes cells, so only its input needs the mask M.

    Args:
        dim: channels C.
        mlp_ratio: hidden channels of the MLP, as a multiple of ``dim``.
        drop_path: probability of stochastic depth.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.conv1 = PatchConv(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, kernel_size=5, padding=2, groups=dim)
        self.conv2 = PatchConv(dim, dim, 1)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, cells: VisibleCells | None = None) -> Tensor:
        """Map to the same shape: a dense map [B, H, W, C], or visible blocks [B, K, s, s, C] given their ``cells``."""
        mixed = self.conv1(self.norm1(x))
        if cells is not None:
            mixed = cells.put(mixed)
        # The permuted view is a channels-last tensor for the convolution: no copy, and cuDNN's fast path.
        mixed = self.attn(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if cells is not None:
            mixed = cells.take(mixed)
        x = x + self.drop_path(self.conv2(mixed))
        return x + self.drop_path(self.mlp(self.norm2(x)))
