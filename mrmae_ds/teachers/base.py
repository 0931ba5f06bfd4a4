"""Base classes of frozen teachers, and the attention that serves as patch importance.

Shape legend: B images, L patch tokens in raster order, C the teacher's width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.config.stages import PretrainConfig
from mrmae_ds.imagenet import Rgb
from mrmae_ds.models.hog import hog_of_pixels
from mrmae_ds.models.masking import TokenMask, VisibleSet, choose_visible
from mrmae_ds.models.objectives import HOG, Objective
from mrmae_ds.teachers.options import TeacherOptions


class TeacherOutput(NamedTuple):
    """Targets of a batch.

    Attributes:
        tokens: patch features, float32 [B, L, C]; those of several layers are concatenated, [B, L, layers * C]. Of a
            teacher that sees the visible tokens only, the others mean nothing.
        importance: non-negative weight of each patch, float32 [B, L].
        class_token: features of the class token, [B, 1, C] or likewise [B, 1, layers * C]; None without one. They are
            in the precision of the teacher, as most methods do not use them.
    """

    tokens: Tensor
    importance: Tensor
    class_token: Tensor | None = None


def draw_visible(
    stage: PretrainConfig,
    outputs: Mapping[str, TeacherOutput],
    noise: Tensor,
    grid: tuple[int, int],
    stride: int,
) -> VisibleSet | TokenMask:
    """Draw the visible set or the mask of each image as a recipe says.

    Args:
        stage: the recipe's pre-training stage.
        outputs: of the teachers by name; only one that ``stage.masking`` names is used.
        noise: uniform in [0, 1), [B, L] (of the squares of ``masking.unit``, if it is given); the only source of
            randomness. For mode ``block``, also the removed tokens, bool [B, L].
        grid: rows and columns of the token grid.
        stride: side of a token in pixels.
    """
    masking = stage.masking
    if masking is None:
        return TokenMask.whole(len(noise), grid, noise.device)
    if masking.mode == "block":
        if noise.dtype != torch.bool:
            noise = masking.draw_blocks([row.numpy().tobytes() for row in noise.cpu()], grid).to(noise.device)
        return TokenMask(noise, grid)
    importance = None if masking.mode == "random" else outputs[masking.teacher or ""].importance
    assert masking.keep_ratio is not None
    visible = choose_visible(noise, masking.grid(grid, stride), masking.keep_ratio, masking.mode, importance)
    return visible if stage.encoder_input == "visible" else TokenMask.of_units(visible, grid)


def targets_of(
    objectives: Mapping[str, Objective],
    teachers: Mapping[str, Teacher],
    outputs: Mapping[str, TeacherOutput],
    pixels: Tensor,
    stride: int,
) -> dict[str, Tensor]:
    """Return the features that objectives predict, by the objectives' names of their targets.

    Normalized pixels and moving averages are not among them; the student computes them.

    Args:
        objectives: by name.
        teachers: by name.
        outputs: of the teachers.
        pixels: decoded, not normalized images in [0, 1], float32 [B, 3, H, W].
        stride: side of the student's tokens in pixels.

    Returns:
        [B, L, C] each; [B, 1 + L, C] with the class token first if an objective includes it.
    """
    specs = [spec for spec in objectives.values() if spec.target.partition(".")[0] in teachers]
    with_class = {spec.target for spec in specs if spec.class_token}
    targets = {}
    for target in dict.fromkeys(spec.target for spec in specs):
        name, _, layer = target.partition(".")
        parts = [outputs[name].tokens]
        if target in with_class:
            class_token = outputs[name].class_token
            assert class_token is not None  # build_pretraining refuses the objective otherwise
            parts.insert(0, class_token.float())
        if layer:
            layers = teachers[name].layers
            parts = [part.chunk(len(layers), dim=-1)[layers.index(int(layer))] for part in parts]
        targets[target] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if any(spec.target == HOG for spec in objectives.values()):
        targets[HOG] = hog_of_pixels(pixels, stride)
    return targets


@dataclass(frozen=True)
class TeacherSpec:
    """Properties of a teacher that follow from its weights and options.

    Attributes:
        grid: rows and columns of the patch tokens.
        width: channels C of the tokens.
        image_size: side of the input in pixels; other images are resized (bicubic) to it.
        mean: per-channel mean that its input is normalized with, of pixels in [0, 1].
        std: per-channel standard deviation, likewise.
        dtype: of weights and arithmetic.
        sha256: hex digest of the weights.
        details: decisions made while the teacher was built, in words, by topic (``importance``, ``GELU``, ...).
        layers: blocks whose outputs are the targets, 0-based; empty is the last one.
        sees_visible: it computes the student's visible tokens only.
        has_class_token: its output has a class token.
    """

    grid: tuple[int, int]
    width: int
    image_size: int
    mean: Rgb
    std: Rgb
    dtype: torch.dtype
    sha256: str
    details: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    sees_visible: bool = False
    has_class_token: bool = False


class Teacher(nn.Module, ABC):
    """A frozen network that turns images into targets.

    A teacher has its own input statistics and precision, and stays in eval mode. It is not part of the student, and
    never in an optimizer or a checkpoint.

    Attributes:
        network: the module that holds the weights.
        grid: rows and columns of the patch tokens.
        width: channels C of the tokens.
        image_size: side of the input in pixels.
        dtype: of weights and arithmetic.
        sha256: hex digest of the weights.
        details: decisions made while the teacher was built and placed, in words, by topic.
        layers: blocks whose outputs are the targets, 0-based; empty is the last one.
        sees_visible: it computes the student's visible tokens only.
        has_class_token: its output has a class token.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: TeacherSpec) -> None:
        super().__init__()
        self.network = network.to(spec.dtype)
        self.grid, self.width, self.image_size = spec.grid, spec.width, spec.image_size
        self.dtype, self.sha256, self.details = spec.dtype, spec.sha256, dict(spec.details)
        self.layers, self.sees_visible, self.has_class_token = spec.layers, spec.sees_visible, spec.has_class_token
        # Cloned, because the base tensor of a view would outlive free_weights.
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1).clone(), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1).clone(), persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Do nothing: a teacher is always in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, pixels: Tensor, visible: VisibleSet | None = None) -> TeacherOutput:
        """Compute the targets of images.

        Args:
            pixels: decoded, not normalized images in [0, 1], float [B, 3, H, W].
            visible: the student's visible set, for a teacher that sees it; None is all tokens.
        """
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        images = ((pixels - self.mean) / self.std).to(self.dtype)
        # The engine's autocast is process-wide; a teacher computes in its own precision.
        with torch.autocast(pixels.device.type, enabled=False):
            output = self.encode(images) if visible is None else self.encode_visible(images, visible)
        return output._replace(tokens=output.tokens.float(), importance=output.importance.float())

    @abstractmethod
    def encode(self, images: Tensor) -> TeacherOutput:
        """Return the output of normalized images [B, 3, H, W]."""

    def encode_visible(self, images: Tensor, visible: VisibleSet) -> TeacherOutput:
        """Return the output of the visible tokens of normalized images [B, 3, H, W]; for ``sees_visible`` only."""
        raise NotImplementedError

    def free_weights(self) -> None:
        """Free the memory of all weights, even if the network is referenced elsewhere; all attributes stay."""
        for tensor in [*self.parameters(), *self.buffers()]:
            tensor.data = tensor.data.new_empty(0)
        self.network = nn.Identity()


class TokenReader(Protocol):
    """Function that extracts tokens and importance from one kind of network.

    Attributes:
        grid: rows and columns of the tokens.
        width: channels C of the tokens.
        importance: description of the importance, in words.
        has_class_token: the output has a class token.
    """

    grid: tuple[int, int]
    width: int
    importance: str
    has_class_token: bool

    # Any: each reader names the kind of network that it was built for.
    def __call__(self, network: Any, images: Tensor, /) -> TeacherOutput:
        """Return the output of normalized images [B, 3, H, W]."""
        ...


class LibraryTeacher(Teacher):
    """A network from a library together with the reader of its tokens.

    Args:
        network: the network with its weights.
        reader: extracts tokens and importance from ``network``.
        options: options from the recipe.
        statistics: mean and std of the weights, unless the options replace them.
        sha256: hex digest of the weights.
        details: decisions to record besides the description of the importance.
    """

    def __init__(
        self,
        network: nn.Module,
        reader: TokenReader,
        options: TeacherOptions,
        statistics: tuple[Rgb, Rgb],
        sha256: str,
        details: Mapping[str, str],
    ) -> None:
        mean, std = options.statistics or statistics
        super().__init__(
            network,
            TeacherSpec(
                grid=reader.grid,
                width=reader.width,
                image_size=options.image_size,
                mean=mean,
                std=std,
                dtype=options.dtype,
                sha256=sha256,
                details={"importance": reader.importance, **details},
                layers=options.layers,
                sees_visible=options.sees_visible,
                has_class_token=reader.has_class_token,
            ),
        )
        self.reader = reader

    def encode(self, images: Tensor) -> TeacherOutput:
        """Return the output of normalized images [B, 3, H, W]."""
        return self.reader(self.network, images)


class MetaTeacher(LibraryTeacher):
    """A network on the meta device with the reader of its tokens: shapes without weights.

    Args:
        network: the network.
        reader: extracts tokens and importance from ``network``.
        options: options from the recipe.
    """

    def __init__(self, network: nn.Module, reader: TokenReader, options: TeacherOptions) -> None:
        # Images on the meta device have no values to normalize.
        super().__init__(network, reader, options, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "", {})


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
    position_bias: Tensor | None = None,
) -> Tensor:
    """Compute the class token's attention to the patches, averaged over heads.

    Only the needed row of the attention matrix is computed.

    Args:
        x: input of the attention layer (after its norm), [B, prefix + L, C].
        qkv_weight: projection to queries, keys and values, [3D, C] with D channels over all heads.
        qkv_bias: its bias [3D], or None.
        num_heads: heads of the layer.
        prefix: number of tokens before the patches.
        from_class: the first prefix token is the class token. If False, or without any prefix, the mean over the
            patches' queries is returned instead: the attention that each patch receives.
        q_norm: norm of the queries per head, where the layer has one.
        k_norm: norm of the keys per head, where the layer has one.
        position_bias: of relative positions, added to the scores, [heads, prefix + L, prefix + L].

    Returns:
        Attention to each patch, float32 [B, L].
    """
    dim = qkv_weight.shape[0] // 3
    queries = x[:, :1] if prefix and from_class else x[:, prefix:]
    bias_q, bias_k = (None, None) if qkv_bias is None else (qkv_bias[:dim], qkv_bias[dim : 2 * dim])
    q = F.linear(queries, qkv_weight[:dim], bias_q).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = F.linear(x, qkv_weight[dim : 2 * dim], bias_k).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    q, k = q_norm(q) if q_norm else q, k_norm(k) if k_norm else k
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    if position_bias is not None:
        scores = scores + (position_bias[:, :1] if prefix and from_class else position_bias[:, prefix:])
    attention = scores.softmax(-1)
    return attention.mean(dim=(1, 2))[:, prefix:]


def join_layers(tokens: Sequence[Tensor], prefix: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate the patch tokens [B, L, C] of layers, and their class tokens, the first of each prefix [B, P, C]."""
    if len(tokens) == 1:
        return tokens[0], prefix[0][:, :1]
    return torch.cat(list(tokens), dim=-1), torch.cat([part[:, :1] for part in prefix], dim=-1)


def describe_importance(has_class: bool) -> str:
    """Describe the result of :func:`class_attention` with or without a class token."""
    what = "class token to patches" if has_class else "received by each patch on average (there is no class token)"
    return f"last block's attention, {what}"


class LastBlockInput:
    """Context manager that captures the input of a block: ``with LastBlockInput(block) as captured: ...; captured.x``.

    Attributes:
        x: the block's input [B, N, C] in the last forward inside the context.
    """

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
    """Return the hex SHA-256 over names and bytes of all tensors, for weights that are not a local file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
