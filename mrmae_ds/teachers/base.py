"""What every teacher is: frozen, in eval mode, with its own input statistics and precision.

Shape legend: B images, L patch tokens in raster order, C the teacher's width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import Rgb
from mrmae_ds.teachers.options import TeacherOptions


class TeacherOutput(NamedTuple):
    """``tokens`` float32 [B, L, C] and ``importance`` float32 [B, L], not negative."""

    tokens: Tensor
    importance: Tensor


class Teacher(nn.Module, ABC):
    """A frozen network that turns images into targets.

    Not part of the student, never in an optimizer or a checkpoint. ``train()`` has no effect.

    Attributes:
        grid: rows and columns of its patch tokens.
        width: C.
        sha256: of its weights file.
        image_size: side of its input in pixels; other images are resized (bicubic) to it.
        facts: what was found out or decided while it was built, in words, by topic (``importance``, ``GELU``, ...).
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
        facts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.grid, self.width, self.image_size = grid, width, image_size
        self.dtype, self.sha256, self.facts = dtype, sha256, dict(facts or {})
        # Not views: what they are views of would outlive forget_weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1).clone(), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1).clone(), persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode whatever is asked."""
        return self

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Targets of images: float [B, 3, H, W] in 0 to 1, as they were decoded (no normalization)."""
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
        """Tokens [B, L, C] and importance [B, L] of normalized images [B, 3, H, W]."""

    def forget_weights(self) -> None:
        """Free the memory of all weights, whoever else holds the network. What is known of the teacher stays."""
        for tensor in [*self.parameters(), *self.buffers()]:
            tensor.data = tensor.data.new_empty(0)
        self.network = nn.Identity()


class TokenReader(Protocol):
    """How tokens and importance are read off a kind of network.

    Attributes:
        grid, width: of the tokens. importance: what it is, in words.
    """

    grid: tuple[int, int]
    width: int
    importance: str

    def __call__(self, network: nn.Module, images: Tensor, /) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, C] and importance [B, L] of normalized images [B, 3, H, W]."""
        ...


class LibraryTeacher(Teacher):
    """A network of a library, and what reads it.

    Args:
        network: with its weights. reader: of its tokens.
        options: the recipe's.
        statistics: the weights' own mean and std, which the options may replace.
        sha256: of the weights. facts: besides what the importance is.
    """

    def __init__(
        self,
        network: nn.Module,
        reader: TokenReader,
        options: TeacherOptions,
        statistics: tuple[Rgb, Rgb],
        sha256: str,
        facts: Mapping[str, str],
    ) -> None:
        mean, std = options.statistics or statistics
        super().__init__(
            network,
            grid=reader.grid,
            width=reader.width,
            image_size=options.image_size,
            mean=mean,
            std=std,
            dtype=options.dtype,
            sha256=sha256,
            facts={"importance": reader.importance, **facts},
        )
        self.reader = reader

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Teacher.encode`."""
        return self.reader(self.network, images)


def class_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    prefix: int,
    *,
    from_class: bool = True,
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
) -> Tensor:
    """Attention of the class token to the patches, mean over heads: one row instead of the whole matrix.

    Args:
        x: the attention layer's input (after its norm), [B, prefix + L, C].
        qkv_weight: [3D, C] of D channels over all heads; qkv_bias: [3D] or None.
        num_heads: heads of the layer.
        prefix: tokens before the patches.
        from_class: the first of them is the class token. If not, or without any prefix, the mean over the patches'
            queries is returned instead: the attention each patch receives.
        q_norm, k_norm: of queries and keys, per head, where the layer has them.

    Returns:
        float32 [B, L].
    """
    dim = qkv_weight.shape[0] // 3
    queries = x[:, :1] if prefix and from_class else x[:, prefix:]
    bias_q, bias_k = (None, None) if qkv_bias is None else (qkv_bias[:dim], qkv_bias[dim : 2 * dim])
    q = F.linear(queries, qkv_weight[:dim], bias_q).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = F.linear(x, qkv_weight[dim : 2 * dim], bias_k).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    q, k = q_norm(q) if q_norm else q, k_norm(k) if k_norm else k
    attention = (q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return attention.mean(dim=(1, 2))[:, prefix:]


def check_tiles(patch: int, image_size: int, key: str) -> None:
    """Check that patches of a side cover an image of a side; libraries leave the rest of it out without a word.

    Raises:
        UserError: naming the recipe key and the sizes next to it that would do.
    """
    if image_size % patch:
        below = image_size // patch * patch
        near = f"{below} or {below + patch}" if below else str(patch)
        raise UserError(f"{key}.image_size: patches of {patch} do not tile {image_size} pixels; {near} would do")


def importance_words(has_class: bool) -> str:
    """What :func:`class_attention` is, for people."""
    what = "class token to patches" if has_class else "what each patch gets on average (there is no class token)"
    return f"last block's attention, {what}"


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


def tensors_sha256(network: nn.Module) -> str:
    """Hex sha256 over names and bytes of all tensors, for weights that did not come from a named file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
