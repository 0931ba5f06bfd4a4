"""Parameter groups, built by name before anything is partitioned, and the AdamW over them.

A partitioned parameter is one-dimensional, so "no decay for 1-D" is decided on the shape of the whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn
from torch.optim import AdamW, Optimizer

from mrmae_ds.config.optimizers import DetectOptimizerConfig
from mrmae_ds.detection.param_groups import detectron2_rules
from mrmae_ds.models.encoders import Encoder

ParamGroups = list[dict[str, Any]]
MakeOptimizer = Callable[[ParamGroups, bool], Optimizer]  # groups, and whether to use a fused implementation


def adamw(betas: tuple[float, float]) -> MakeOptimizer:
    """Return a function that builds AdamW over parameter groups; the learning rate is set before every step.

    Args:
        betas: decay rates of the two moments.
    """
    return lambda groups, fused: AdamW(groups, lr=0.0, betas=betas, fused=fused)


def pretrain_groups(model: nn.Module, weight_decay: float) -> ParamGroups:
    """Return two groups: decayed and not decayed.

    1-D parameters and biases are not decayed, nor the encoder's ``undecayed``; the mask token and other class tokens
    are. Frozen parameters are in neither.

    Args:
        model: the student.
        weight_decay: weight decay of the decayed parameters.

    Returns:
        Groups with ``params``, ``weight_decay``, ``lr_scale`` and ``name``.
    """
    undecayed = getattr(getattr(model, "encoder", None), "undecayed", ())
    without = {f"encoder.{name}" for name in undecayed}
    return _grouped(model, weight_decay, {}, lambda name, shape: name not in without and _is_matrix(name, shape))


def finetune_groups(model: Encoder, weight_decay: float, layer_decay: float) -> ParamGroups:
    """Return groups by layer and decay: the learning rate of layer i is scaled by ``layer_decay ** (last layer - i)``.

    The model defines the layer of each parameter (``group_matcher``) and the parameters with more than one dimension
    that are not decayed (``no_weight_decay``): in fine-tuning, the position embedding is trained.

    Args:
        model: an encoder with a classification head.
        weight_decay: weight decay of the decayed parameters.
        layer_decay: factor per layer.

    Returns:
        Groups with ``params``, ``weight_decay``, ``lr_scale`` and ``name``.
    """
    layers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    scales = {name: layer_decay ** (last - layer) for name, layer in layers.items()}
    without = model.no_weight_decay()
    return _grouped(model, weight_decay, scales, lambda name, shape: name not in without and _is_matrix(name, shape))


def detection_groups(model: nn.Module, optimizer: DetectOptimizerConfig, layer_decay: float) -> ParamGroups:
    """Return groups by layer and decay.

    Args:
        model: the detector.
        optimizer: weight decay, and the rule by which parameters have it.
        layer_decay: factor per layer of the encoder.

    Returns:
        Groups with ``params``, ``weight_decay``, ``lr_scale`` and ``name``.
    """
    rules = detectron2_rules([name for name, _ in model.named_parameters()], layer_decay)
    scales = {name: rule.scale for name, rule in rules.items()}
    as_published = optimizer.groups == "detectron2"
    return _grouped(
        model,
        optimizer.weight_decay,
        scales,
        lambda name, shape: rules[name].decays and (as_published or _is_matrix(name, shape)),
    )


def _is_matrix(name: str, shape: torch.Size) -> bool:
    return len(shape) > 1 and not name.endswith(".bias")


def _grouped(
    model: nn.Module, weight_decay: float, scales: dict[str, float], decays: Callable[[str, torch.Size], bool]
) -> ParamGroups:
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = decays(name, getattr(parameter, "ds_shape", parameter.shape))
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
