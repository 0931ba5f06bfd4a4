"""What every teacher is: frozen, in eval mode, with its own input statistics and precision.

Shape legend: B pictures, L patch tokens in raster order, C the teacher's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TeacherOutput(NamedTuple):
    """``tokens`` float32 [B, L, C] and ``importance`` float32 [B, L], not negative."""

    tokens: Tensor
    importance: Tensor


class Teacher(nn.Module, ABC):
    """A frozen network that turns pictures into targets.

    Not part of the student, never in an optimiser or a checkpoint. ``train()`` has no effect.

    Attributes:
        grid: rows and columns of its patch tokens.
        width: C.
        sha256: of its weights file.
        image_size: side of its input in pixels; other pictures are resized (bicubic) to it.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        grid: tuple[int, int],
        width: int,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        dtype: torch.dtype,
        sha256: str,
    ) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.grid, self.width, self.image_size = grid, width, image_size
        self.dtype, self.sha256 = dtype, sha256
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode whatever is asked."""
        return self

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Targets of pictures: float [B, 3, H, W] in 0 to 1, as they were decoded (no normalisation)."""
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        images = ((pixels - self.mean) / self.std).to(self.dtype)
        # The engine's autocast is process-wide; a teacher computes in its own precision.
        with torch.autocast(pixels.device.type, enabled=False):
            tokens, importance = self.encode(images)
        return TeacherOutput(tokens.float(), importance.float())

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, C] and importance [B, L] of normalised pictures [B, 3, H, W]."""


def class_attention(x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, prefix: int) -> Tensor:
    """Attention of the class token to the patches, mean over heads: one row instead of the whole matrix.

    Args:
        x: the attention layer's input (after its norm), [B, prefix + L, C]; the class token is first.
        qkv_weight: [3C, C]; qkv_bias: [3C] or None.
        num_heads: heads of the layer.
        prefix: tokens before the patches. With 0 there is no class token and the mean over all queries
            is returned instead (the attention each patch receives).

    Returns:
        float32 [B, L].
    """
    dim = x.shape[-1]
    head_dim = dim // num_heads
    queries = x[:, :1] if prefix else x
    bias_q, bias_k = (None, None) if qkv_bias is None else (qkv_bias[:dim], qkv_bias[dim : 2 * dim])
    q = F.linear(queries, qkv_weight[:dim], bias_q).unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
    k = F.linear(x, qkv_weight[dim : 2 * dim], bias_k).unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
    attention = (q.float() @ k.float().transpose(-1, -2) * head_dim**-0.5).softmax(-1)
    return attention.mean(dim=(1, 2))[:, prefix:]


class LastBlockInput:
    """Keeps the input of a block during one forward: ``with LastBlockInput(block) as seen: ...; seen.x``."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.x: Tensor

    def __enter__(self) -> LastBlockInput:
        self.handle = self.block.register_forward_pre_hook(self._keep)
        return self

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.x = inputs[0]

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
