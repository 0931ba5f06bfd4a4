"""ViTDet's simple feature pyramid: five maps of strides 4 to 64 from the last map of an encoder.

Names are those of Detectron2's ``SimpleFeaturePyramid``. Shape legend: B images, C channels, h x w cells of stride 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.models.windowed import WindowedCViT, WindowedViT

STRIDES = (4, 8, 16, 32, 64)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of maps; mean and variance in float32, the result in the input's type.

    Not a ``torch.nn.LayerNorm``, because Detectron2's parameter groups, which the detector's recipes use, decay it.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to the same shape."""
        y = x.permute(0, 2, 3, 1).float()
        y = F.layer_norm(y, y.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
        return y.permute(0, 3, 1, 2).to(x.dtype)


class NormConv2d(nn.Conv2d):
    """Convolution that keeps the size, without bias, and the norm of its output; no activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.norm = LayerNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, h, w] to [B, out, h, w]."""
        return self.norm(super().forward(x))


class SimplePyramid(nn.Module):
    """An encoder and its pyramid.

    Args:
        net: encoder to a map [B, C, h, w] of stride 16.
        channels: channels of every level.
    """

    def __init__(self, net: WindowedCViT | WindowedViT, channels: int = 256) -> None:
        super().__init__()
        self.net, self.channels = net, channels
        width = net.embed_dim
        half, quarter = width // 2, width // 4
        up = nn.ConvTranspose2d(width, half, 2, stride=2), LayerNorm2d(half), nn.GELU()
        self.simfp_2 = nn.Sequential(*up, nn.ConvTranspose2d(half, quarter, 2, stride=2), *_level(quarter, channels))
        self.simfp_3 = nn.Sequential(nn.ConvTranspose2d(width, half, 2, stride=2), *_level(half, channels))
        self.simfp_4 = nn.Sequential(*_level(width, channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2), *_level(width, channels))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the levels p2 to p6 of normalized images [B, 3, H, W]: [B, channels, H/s, W/s] for strides s."""
        x = self.net(images)
        levels = [self.simfp_2(x), self.simfp_3(x), self.simfp_4(x), self.simfp_5(x)]
        return [*levels, levels[-1][:, :, ::2, ::2]]


def _level(in_channels: int, channels: int) -> tuple[NormConv2d, NormConv2d]:
    return NormConv2d(in_channels, channels, 1), NormConv2d(channels, channels, 3)
