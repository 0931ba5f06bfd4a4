"""MCMAE written a second time: whole maps, the mask multiplied in, plain conv2d, any precision.

Shares no code with mrmae_ds. Weights are a mapping by the authors' parameter names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def channel_norm(x: Tensor, state: State, name: str) -> Tensor:
    """LayerNorm over the channels of [B, C, H, W]."""
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
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


def latent(
    images: Tensor,
    kept: list[list[int]],
    state: State,
    heads: int,
    positions: Tensor,
    blocks: tuple[int, ...] = (),
) -> Tensor:
    """The fused, normalised visible tokens [B, K, C], in the order of ``kept`` (token numbers of each picture)."""
    x1 = patch_embed(images, state, "patch_embed1")
    x1 = conv_stage(x1, state, 1, visible_cells(kept, positions, x1))
    x2 = patch_embed(x1, state, "patch_embed2")
    x2 = conv_stage(x2, state, 2, visible_cells(kept, positions, x2))
    x3 = patch_embed(x2, state, "patch_embed3").flatten(2).transpose(1, 2)
    x3 = gather(linear(x3, state, "patch_embed4") + positions, kept)
    outputs = attention_blocks(x3, state, "blocks3", heads)
    fused = outputs[-1] + sum(outputs[i] for i in blocks)
    for stage, x in ((1, x1), (2, x2)):
        name = f"stage{stage}_output_decode"
        if f"{name}.weight" in state:
            stride = state[f"{name}.weight"].shape[-1]
            fused = fused + gather(conv(x, state, name, stride=stride).flatten(2).transpose(1, 2), kept)
    return token_norm(fused, state, "norm")


def visible_cells(kept: list[list[int]], positions: Tensor, x: Tensor) -> Tensor:
    """1 on the cells of the map ``x`` that visible tokens cover, else 0: [B, 1, H, W]."""
    side = int(positions.shape[1] ** 0.5)
    cells = x.shape[-1] // side
    visible = x.new_zeros(len(kept), 1, *x.shape[2:])
    for row, numbers in enumerate(kept):
        for number in numbers:
            top, left = number // side * cells, number % side * cells
            visible[row, :, top : top + cells, left : left + cells] = 1
    return visible


def gather(tokens: Tensor, kept: list[list[int]]) -> Tensor:
    """The tokens ``kept`` of each picture."""
    return torch.stack([row[numbers] for row, numbers in zip(tokens, kept, strict=True)])


def pixel_loss(
    images: Tensor, tokens: Tensor, kept: list[list[int]], state: State, heads: int, positions: Tensor
) -> Tensor:
    """MAE's loss with norm_pix from the visible tokens' latent."""
    embedded = linear(tokens, state, "decoder_embed")
    rows = []
    for row, numbers in zip(embedded, kept, strict=True):
        place = {number: i for i, number in enumerate(numbers)}
        filler = state["mask_token"][0, 0]
        rows.append(torch.stack([row[place[t]] if t in place else filler for t in range(positions.shape[1])]))
    x = attention_blocks(torch.stack(rows) + positions, state, "decoder_blocks", heads)[-1]
    prediction = linear(token_norm(x, state, "decoder_norm"), state, "decoder_pred")
    side = int(positions.shape[1] ** 0.5)
    patch = images.shape[-1] // side
    losses = []
    for picture, numbers in enumerate(kept):
        for t in set(range(side * side)) - set(numbers):
            top, left = t // side * patch, t % side * patch
            pixels = images[picture, :, top : top + patch, left : left + patch].permute(1, 2, 0).flatten()
            pixels = (pixels - pixels.mean()) / (pixels.var(unbiased=True) + 1e-6).sqrt()
            losses.append((prediction[picture, t] - pixels).square().mean())
    return torch.stack(losses).mean()
