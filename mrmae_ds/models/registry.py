"""The CViTs as timm models: ``import mrmae_ds``, then ``timm.create_model("cvit_huge", img_size=392, num_classes=10)``.

Imported by mrmae_ds/timm_hook.py when timm is. The models themselves are imported when one is built: this module may
run while they are being imported, because they import timm.
"""

from __future__ import annotations

from dataclasses import fields
from math import isqrt
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.positions import resize_positions
from mrmae_ds.models.sizes import CViTSpec, encoder_spec

FIELDS = [field.name for field in fields(CViTSpec)]


def _default_cfg(pixels: int = 224) -> dict[str, Any]:
    """No weights: there is no public file of these models to name."""
    return {
        "num_classes": 1000,
        "input_size": (3, pixels, pixels),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
    }


# register_model looks them up under this name.
default_cfgs = generate_default_cfgs(
    {
        "cvit_tiny": _default_cfg(32),
        "cvit_small": _default_cfg(),
        "cvit_base": _default_cfg(),
        "cvit_large": _default_cfg(),
        "cvit_huge": _default_cfg(),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A file's tensors as ``model`` names and sizes them; for ``pretrained_cfg_overlay={"file": ...}``.

    Of this project's pre-training files the encoder is taken. The position embedding is resized if its number of tokens
    is not the model's.

    Raises:
        UserError: if that number is no square, so that its grid is not known.
    """
    prefix = "encoder."
    if any(name.startswith(prefix) for name in state_dict):
        state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    positions = state_dict.get("pos_embed")
    if positions is not None and positions.shape[1] != model.grid[0] * model.grid[1]:
        side = isqrt(positions.shape[1])
        if side**2 != positions.shape[1]:
            raise UserError(
                f"pos_embed: the file has {positions.shape[1]} tokens, no square, and the model {model.grid}; "
                "build the model with the file's img_size, then call set_input_size"
            )
        state_dict = {**state_dict, "pos_embed": resize_positions(positions, (side, side), model.grid)}
    return state_dict


def _build(spec: CViTSpec, **settings: Any) -> nn.Module:
    from mrmae_ds.models.cvit import CViT
    from mrmae_ds.models.weights import init_classifier

    model = CViT(spec, **settings)
    if model.num_classes:
        init_classifier(model)
    return model


def _create(arch: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    overrides = {name: settings.pop(name) for name in FIELDS if name in settings}
    return build_model_with_cfg(
        _build,
        arch,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        spec=encoder_spec(arch, overrides, key=arch),
        **settings,
    )


@register_model
def cvit_tiny(pretrained: bool = False, **settings: Any) -> nn.Module:
    """CViT-Tiny, stride 4, for pictures of 32 pixels; see :func:`cvit_base`."""
    return _create("cvit_tiny", pretrained, settings)


@register_model
def cvit_small(pretrained: bool = False, **settings: Any) -> nn.Module:
    """CViT-Small, stride 16; see :func:`cvit_base`."""
    return _create("cvit_small", pretrained, settings)


@register_model
def cvit_base(pretrained: bool = False, **settings: Any) -> nn.Module:
    """CViT-Base, stride 16.

    Args:
        pretrained: load the weights that ``pretrained_cfg_overlay={"file": ...}`` names.
        settings: fields of :class:`mrmae_ds.models.sizes.CViTSpec`, arguments of
            :class:`mrmae_ds.models.cvit.CViT`, and what timm's ``create_model`` takes.

    Raises:
        UserError: for a field's wrong value, an ``img_size`` that the patches do not tile, an unknown ``global_pool``.
    """
    return _create("cvit_base", pretrained, settings)


@register_model
def cvit_large(pretrained: bool = False, **settings: Any) -> nn.Module:
    """CViT-Large, stride 16; see :func:`cvit_base`."""
    return _create("cvit_large", pretrained, settings)


@register_model
def cvit_huge(pretrained: bool = False, **settings: Any) -> nn.Module:
    """CViT-Huge, stride 14; see :func:`cvit_base`."""
    return _create("cvit_huge", pretrained, settings)
