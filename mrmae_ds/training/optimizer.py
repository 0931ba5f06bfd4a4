"""Parameter groups, built by name before anything is partitioned.

Under ZeRO-3 a partitioned parameter is one-dimensional, so "no decay for 1-D" must be decided on the whole model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Fine-tuning trains the position embedding, without decay (MAE's and MCMAE's no_weight_decay lists).
NO_DECAY_NAMES = frozenset({"pos_embed", "cls_token"})
PARTS_BEFORE_BLOCKS = ("pos_embed", "cls_token", "patch_embed", "blocks1.", "blocks2.")


def pretrain_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed or not: 1-D parameters and biases are not, the mask and class tokens are.

    Frozen parameters are in neither. Each group has ``params``, ``weight_decay``, ``lr_scale`` and ``name``.
    """
    return _grouped(model, weight_decay, {}, frozenset())


def finetune_groups(model: nn.Module, weight_decay: float, layer_decay: float, depth: int) -> list[dict[str, Any]]:
    """Groups by layer and decay: the rate of layer i is scaled by ``layer_decay ** (depth + 1 - i)``.

    Args:
        model: a classifier.
        weight_decay: of the decayed parameters.
        layer_decay: factor a layer.
        depth: number of transformer blocks.
    """
    scales = {name: layer_decay ** (depth + 1 - layer_of(name, depth)) for name, _ in model.named_parameters()}
    return _grouped(model, weight_decay, scales, NO_DECAY_NAMES)


def layer_of(name: str, depth: int) -> int:
    """Layer of a classifier's parameter: 0 for positions, patches and both convolutional stages, then the
    transformer's blocks from 1, ``depth + 1`` for the rest.
    """
    if name.startswith(PARTS_BEFORE_BLOCKS):
        return 0
    head, _, rest = name.partition(".")
    if head in ("blocks", "blocks3"):
        return int(rest.split(".")[0]) + 1
    return depth + 1


def _grouped(
    model: nn.Module, weight_decay: float, scales: dict[str, float], no_decay: frozenset[str]
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(".bias") and name not in no_decay
        scale = scales.get(name, 1.0)
        group = groups.setdefault(
            (scale, decayed),
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": scale,
                "name": f"scale {scale:.6g}, {'decay' if decayed else 'no decay'}",
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
