"""Tensors that a checkpoint lacks, by comparison with the model of its sizes or with its other blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch

from mrmae_ds.errors import UserError
from mrmae_ds.models.sizes import FAMILIES, EncoderSpec, make_spec
from mrmae_ds.units import first_few
from mrmae_ds.weights.shapes import CLIP_BLOCKS, Shapes


def missing_of_encoder(
    family: str,
    sizes: Mapping[str, Any],
    shapes: Shapes,
    names: Mapping[str, str],
    grid: tuple[int, int] | None,
    relative: bool,
) -> str:
    """Compare an encoder's tensors with those of the model of its sizes; "" if all are there in the right shape.

    Args:
        family: ``cvit``, ``vit`` or ``beit``.
        sizes: fields of the family's spec.
        shapes: shapes by the names of the file.
        names: this project's names by those of the file.
        grid: rows and columns of the position embedding; None if they are unknown.
        relative: the encoder of a detector, which needs no class token.
    """
    try:
        # Any number of heads gives the same shapes, but of BEiT's tables.
        spec = make_spec(FAMILIES[family], {"num_heads": 1, **sizes}, "the file")
        expected = _bare_shapes(spec, grid or (1, 1))
    except UserError as error:
        return str(error)
    theirs = {ours.removeprefix("encoder."): name for name, ours in names.items() if ours.startswith("encoder.")}
    missing = [name for name in expected if name not in theirs and not (relative and name == "cls_token")]
    if missing:
        return f"encoder tensors are missing: {len(missing)} ({first_few(missing, 6)})"
    for name, shape in expected.items():
        if name not in theirs:
            continue
        found = shapes[theirs[name]]
        resized = name == "pos_embed" and len(found) == 3 and (found[0], found[2]) == (shape[0], shape[2])
        if found != shape and not resized:
            return f"{theirs[name]} is {shapes[theirs[name]]}, expected {shape}"
    return ""


def missing_of_norms(names: Mapping[str, str], pool: str) -> str:
    """Report a tensor that the norm before a head lacks, or half of any last norm; "" if there is none.

    Args:
        names: this project's names by those of the file.
        pool: input of the head; "" without a head that is taken.
    """
    held = set(names.values())
    needed = {"": "", "token": "encoder.norm."}.get(pool, "encoder.fc_norm.")
    for norm in ("encoder.norm.", "encoder.fc_norm.", "fusion.norm."):
        both = {f"{norm}weight", f"{norm}bias"}
        if (norm == needed or both & held) and (missing := sorted(both - held)):
            name = " and ".join(name.removeprefix("encoder.").removeprefix("fusion.") for name in missing)
            return f"lacks {name} of the norm after its last block{', before its head' * (norm == needed)}"
    return ""


@cache
def _bare_shapes(spec: EncoderSpec, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    from mrmae_ds.models.encoders import build_encoder  # imports timm, which may be importing timm_registry.py

    with torch.device("meta"):
        encoder = build_encoder(spec, (grid[0] * spec.stride, grid[1] * spec.stride))
    return {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}


def uneven_blocks(names: Iterable[str], prefix: str) -> str:
    """Report a tensor that some of a transformer's equal blocks lack; "" if they are equal.

    Args:
        names: of the tensors.
        prefix: of the blocks' names, before their number.
    """
    blocks: dict[int, set[str]] = {}
    for name in names:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal():
            blocks.setdefault(int(number), set()).add(rest)
    if not blocks:
        return f"encoder tensors are missing: all of {prefix}*"
    whole = set().union(*blocks.values())
    missing = [f"{prefix}{i}.{rest}" for i in range(max(blocks) + 1) for rest in sorted(whole - blocks.get(i, set()))]
    return f"encoder tensors are missing: {len(missing)} ({first_few(missing, 6)})" if missing else ""


def missing_of_tower(shapes: Shapes) -> str:
    """Report a tensor that a CLIP image tower lacks; towers of timm are not checked."""
    if "visual.conv1.weight" not in shapes:
        return ""
    if any(name.startswith("visual.layer1.") for name in shapes):
        return "its image tower is a ResNet, which has no patch tokens; choose the weights of a ViT-* model"
    layers = ("ln_post.weight", "class_embedding", "positional_embedding")  # some towers have no ln_pre
    missing = [f"visual.{name}" for name in layers if f"visual.{name}" not in shapes]
    if missing:
        return f"tensors of the image tower are missing: {len(missing)} ({first_few(missing, 6)})"
    return uneven_blocks(shapes, CLIP_BLOCKS)
