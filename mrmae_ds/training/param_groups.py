"""Parameter groups, built by name before anything is partitioned.

A partitioned parameter is one-dimensional, so "no decay for 1-D" is decided on the shape of the whole one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timm.models import group_parameters
from torch import nn


def pretrain_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed or not: 1-D parameters and biases are not, the mask and class tokens are.

    Frozen parameters are in neither. Each group has ``params``, ``weight_decay``, ``lr_scale`` and ``name``.
    """
    return _grouped(model, weight_decay, {}, ())


def finetune_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups by layer and decay: the rate of layer i is scaled by ``layer_decay ** (last layer - i)``.

    The model says which layer a parameter is of (``group_matcher``), and which parameters with more than one dimension
    are not decayed (``no_weight_decay``): in fine-tuning the position embedding is trained.

    Args:
        model: a classifier.
        weight_decay: of the decayed parameters.
        layer_decay: factor a layer.
    """
    layers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    scales = {name: layer_decay ** (last - layer) for name, layer in layers.items()}
    return _grouped(model, weight_decay, scales, model.no_weight_decay())


def _grouped(
    model: nn.Module, weight_decay: float, scales: dict[str, float], no_decay: Collection[str]
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decayed = len(shape) > 1 and not name.endswith(".bias") and name not in no_decay
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
