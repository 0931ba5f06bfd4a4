"""Second implementation of MCMAE and MAE, for comparison: on whole feature maps, which it multiplies by the mask.

Shares no code with mrmae_ds. Weights are a mapping by the authors' parameter names; ``kept`` lists the visible token
numbers of each image, in the encoder's order; ``grid`` is (rows, columns).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Kept = list[list[int]]
Grid = tuple[int, int]


def keep_smallest(noise: Tensor, keep_ratio: float) -> Kept:
    """MAE's random masking: the ``int(L * keep_ratio)`` tokens of smallest noise, smallest first."""
    count = int(noise.shape[1] * keep_ratio)
    return [sorted(range(len(row)), key=row.__getitem__)[:count] for row in noise.tolist()]


def sincos(dim: int, grid: Grid, prefix: int) -> Tensor:
    """Position embedding, float64 [1, prefix + L, dim]: column then row, each as sines then cosines."""
    rows = [[0.0] * dim] * prefix
    for y in range(grid[0]):
        for x in range(grid[1]):
            angles = [[place / 10000 ** (i / (dim / 4)) for i in range(dim // 4)] for place in (x, y)]
            rows.append([wave(a) for half in angles for wave in (math.sin, math.cos) for a in half])
    return torch.tensor([rows], dtype=torch.float64)


def channel_norm(x: Tensor, state: State, name: str) -> Tensor:
    """LayerNorm over the channels of [B, C, H, W]."""
    centerd = x - x.mean(1, keepdim=True)
    scaled = centerd / (centerd.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def token_norm(x: Tensor, state: State, name: str) -> Tensor:
    """LayerNorm of tokens, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def conv(x: Tensor, state: State, name: str, **options: int) -> Tensor:
    """conv2d with bias."""
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def linear(x: Tensor, state: State, name: str) -> Tensor:
    """Linear with bias."""
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def patch_embed(x: Tensor, state: State, name: str) -> Tensor:
    """Strided convolution, norm, GELU on [B, C, H, W]."""
    stride = state[f"{name}.proj.weight"].shape[-1]
    return F.gelu(channel_norm(conv(x, state, f"{name}.proj", stride=stride), state, f"{name}.norm"))


def conv_stage(x: Tensor, state: State, stage: int, visible: Tensor) -> Tensor:
    """The blocks of a convolutional stage; ``visible`` is 1 on visible cells, [B, 1, H, W]."""
    depth = len({name.split(".")[1] for name in state if name.startswith(f"blocks{stage}.")})
    for i in range(depth):
        block = f"blocks{stage}.{i}"
        mixed = visible * conv(channel_norm(x, state, f"{block}.norm1"), state, f"{block}.conv1")
        mixed = conv(mixed, state, f"{block}.attn", padding=2, groups=x.shape[1])
        x = x + conv(mixed, state, f"{block}.conv2")
        hidden = F.gelu(conv(channel_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1"))
        x = x + conv(hidden, state, f"{block}.mlp.fc2")
    return x


def attention_blocks(x: Tensor, state: State, prefix: str, heads: int) -> list[Tensor]:
    """Output of every transformer block on [B, N, C]."""
    outputs = []
    for i in range(len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})):
        block = f"{prefix}.{i}"
        batch, count, dim = x.shape
        qkv = linear(token_norm(x, state, f"{block}.norm1"), state, f"{block}.attn.qkv")
        q, k, v = qkv.reshape(batch, count, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (dim // heads) ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).reshape(batch, count, dim), state, f"{block}.attn.proj")
        hidden = F.gelu(linear(token_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1"))
        x = x + linear(hidden, state, f"{block}.mlp.fc2")
        outputs.append(x)
    return outputs


def fused_norm(outputs: list[Tensor], blocks: tuple[int, ...], extra: list[Tensor], state: State) -> Tensor:
    """The last block's output, those of ``blocks`` and ``extra`` added up, then the norm."""
    total = outputs[-1]
    for x in [*(outputs[i] for i in blocks), *extra]:
        total = total + x
    return token_norm(total, state, "norm")


def cvit_encode(images: Tensor, kept: Kept, grid: Grid, state: State, heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the two convolutional stages [B, C, H, W], and of every transformer block [B, K, C]."""
    x1 = patch_embed(images, state, "patch_embed1")
    x1 = conv_stage(x1, state, 1, visible_cells(kept, grid, x1))
    x2 = patch_embed(x1, state, "patch_embed2")
    x2 = conv_stage(x2, state, 2, visible_cells(kept, grid, x2))
    x3 = patch_embed(x2, state, "patch_embed3").flatten(2).transpose(1, 2)
    x3 = gather(linear(x3, state, "patch_embed4") + state["pos_embed"], kept)
    return [x1, x2], attention_blocks(x3, state, "blocks3", heads)


def cvit_latent(
    images: Tensor, kept: Kept, grid: Grid, state: State, heads: int, blocks: tuple[int, ...] = ()
) -> Tensor:
    """MCMAE's fused, normalized visible tokens [B, K, C]."""
    stages, outputs = cvit_encode(images, kept, grid, state, heads)
    extra = []
    for stage, x in enumerate(stages, 1):
        name = f"stage{stage}_output_decode"
        if f"{name}.weight" in state:
            stride = state[f"{name}.weight"].shape[-1]
            extra.append(gather(conv(x, state, name, stride=stride).flatten(2).transpose(1, 2), kept))
    return fused_norm(outputs, blocks, extra, state)


def vit_encode(images: Tensor, kept: Kept, state: State, heads: int) -> list[Tensor]:
    """Outputs of every block, class token first, [B, 1 + K, C]."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = conv(images, state, "patch_embed.proj", stride=patch).flatten(2).transpose(1, 2)
    x = gather(x + state["pos_embed"][:, 1:], kept)
    first = (state["cls_token"] + state["pos_embed"][:, :1]).repeat(len(kept), 1, 1)
    return attention_blocks(torch.cat([first, x], 1), state, "blocks", heads)


def vit_latent(
    images: Tensor, kept: Kept, grid: Grid, state: State, heads: int, blocks: tuple[int, ...] = ()
) -> Tensor:
    """MAE's normalized class and visible tokens [B, 1 + K, C]."""
    return fused_norm(vit_encode(images, kept, state, heads), blocks, [], state)


def classify(images: Tensor, grid: Grid, state: State, heads: int) -> Tensor:
    """Fine-tuning's logits: the mean over all patch tokens, ``fc_norm``, ``head``."""
    everything = [list(range(grid[0] * grid[1]))] * len(images)
    if "cls_token" in state:
        tokens = vit_encode(images, everything, state, heads)[-1][:, 1:]
    else:
        tokens = cvit_encode(images, everything, grid, state, heads)[1][-1]
    return linear(token_norm(tokens.mean(1), state, "fc_norm"), state, "head")


def visible_cells(kept: Kept, grid: Grid, x: Tensor) -> Tensor:
    """1 on the cells of the map ``x`` that visible tokens cover, else 0: [B, 1, H, W]."""
    tokens = x.new_zeros(len(kept), 1, *grid)
    for row, numbers in enumerate(kept):
        for number in numbers:
            tokens[row, 0, number // grid[1], number % grid[1]] = 1
    return F.interpolate(tokens, size=x.shape[2:], mode="nearest")


def gather(tokens: Tensor, kept: Kept) -> Tensor:
    """The tokens ``kept`` of each image."""
    return torch.stack([row[numbers] for row, numbers in zip(tokens, kept, strict=True)])


def decode(latent: Tensor, kept: Kept, state: State, heads: int, prefix: int) -> Tensor:
    """The decoder's normed output for every token of the grid, [B, L, D]."""
    positions = state["decoder_pos_embed"]
    embedded = linear(latent, state, "decoder_embed")
    rows = []
    for row, numbers in zip(embedded, kept, strict=True):
        place = {number: prefix + i for i, number in enumerate(numbers)}
        filler = state["mask_token"][0, 0]
        tokens = [row[place[t]] if t in place else filler for t in range(positions.shape[1] - prefix)]
        rows.append(torch.stack([*row[:prefix], *tokens]))
    x = attention_blocks(torch.stack(rows) + positions, state, "decoder_blocks", heads)[-1]
    return token_norm(x, state, "decoder_norm")[:, prefix:]


def pixel_loss(images: Tensor, decoded: Tensor, kept: Kept, grid: Grid, state: State, norm_pix: bool) -> Tensor:
    """MAE's loss: per removed patch the mean squared error, then the mean over all removed patches."""
    prediction = linear(decoded, state, "decoder_pred")
    patch = images.shape[-1] // grid[1]
    losses = []
    for image, numbers in enumerate(kept):
        for t in sorted(set(range(grid[0] * grid[1])) - set(numbers)):
            top, left = t // grid[1] * patch, t % grid[1] * patch
            pixels = images[image, :, top : top + patch, left : left + patch].permute(1, 2, 0).flatten()
            if norm_pix:
                variance = (pixels - pixels.mean()).square().sum() / (len(pixels) - 1)
                pixels = (pixels - pixels.mean()) / (variance + 1e-6).sqrt()
            losses.append((prediction[image, t] - pixels).square().mean())
    return torch.stack(losses).mean()


def mimic_loss(tokens: Tensor, target: Tensor, kept: Kept, state: State, head: str) -> Tensor:
    """Mean squared error of visible ``tokens`` [B, K, C] through a linear head to the LayerNormed ``target``."""
    target = gather(target, kept)
    target = target - target.mean(-1, keepdim=True)
    target = target / (target.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (linear(tokens, state, head) - target).square().mean()
