"""Register CViTs with timm: after ``import mrmae_ds``, ``timm.create_model("cvit_huge", img_size=392)`` works.

timm_hook.py imports this module when timm is imported. The models themselves are imported only when one is built: this
module may run while they are being imported, because they import timm.

Tracing, also symbolic (``torch.fx``), and ``torch.export`` work on these models; TorchScript's compiler, which torch
has deprecated, does not.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_MEAN, IMAGENET_STD
from mrmae_ds.models.sizes import CViTSpec, encoder_spec
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.states import unwrap

FIELDS = [field.name for field in fields(CViTSpec)]
PREFIX = "encoder."


def _default_cfg(pixels: int = 224) -> dict[str, Any]:
    """Return a default config without weights, because there is no public file of these models."""
    return {
        "num_classes": IMAGENET_CLASSES,
        "input_size": (3, pixels, pixels),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
    }


# register_model looks up this name.
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
    """Convert a file's tensors to the names and sizes of a model; for ``pretrained_cfg_overlay={"file": ...}``.

    From a pre-training file, of this project or as released by MCMAE, the encoder is used, without a class token. The
    position embedding [1, rows, C] is resized if its grid differs from the model's.

    Args:
        state_dict: tensors of the file by name.
        model: the CViT.

    Raises:
        UserError: if the rows of the position embedding do not form a square grid and their number differs from the
            model's.
    """
    from mrmae_ds.models.cvit import CViT
    from mrmae_ds.weights.identify import identify
    from mrmae_ds.weights.load import fit_pos_embed
    from mrmae_ds.weights.names import canonical

    file = canonical(TensorFile(Path("the file"), "pickle", unwrap(state_dict)))
    tensors, identity = file.tensors, identify(file, beside=False)
    if identity.family != "cvit":
        return state_dict
    ours = {full.removeprefix(PREFIX): name for name, full in identity.names.items() if full.startswith(PREFIX)}
    has_token = cast(CViT, model).cls_token is not None
    encoder = {name: tensors[original] for name, original in ours.items() if name != "cls_token" or has_token}
    if "pos_embed" in encoder:
        encoder["pos_embed"] = fit_pos_embed(encoder["pos_embed"], identity, cast(CViT, model), "the file")
    return encoder


def _build(
    spec: CViTSpec, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **settings: Any
) -> nn.Module:
    """Build a model, initialized for fine-tuning if it has a head; timm passes ``device`` and ``dtype``."""
    from mrmae_ds.models.cvit import CViT
    from mrmae_ds.models.encoders import init_classifier

    model = CViT(spec, **settings)
    if model.num_classes:
        init_classifier(model)
    model.register_load_state_dict_pre_hook(_convert_foreign)
    return model.to(device=device, dtype=dtype)


def _convert_foreign(
    model: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: dict[str, Any], strict: bool, *_: list[str]
) -> None:
    """Convert a file with other names than the model's, for ``checkpoint_path``, which timm loads without a filter.

    Raises:
        UserError: if the model has a head and the file has none.
    """
    names = model.state_dict().keys()
    if prefix or state_dict.keys() <= names:
        return
    converted = checkpoint_filter_fn(state_dict, model)
    if strict and "head.weight" in names and "patch_embed1.proj.weight" in converted and "head.weight" not in converted:
        raise UserError(
            "the file contains a CViT without a head, but the model has one; create the model with num_classes=0 and "
            "global_pool='', or replace checkpoint_path by pretrained=True, pretrained_cfg_overlay={'file': FILE}, "
            "which leaves the head at its initial values"
        )
    state_dict.clear()
    state_dict.update(converted)


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
    """Create a CViT-Tiny, stride 4, for images of 32 pixels; see :func:`cvit_base`."""
    return _create("cvit_tiny", pretrained, settings)


@register_model
def cvit_small(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Create a CViT-Small, stride 16; see :func:`cvit_base`."""
    return _create("cvit_small", pretrained, settings)


@register_model
def cvit_base(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Create a CViT-Base, stride 16.

    Args:
        pretrained: load the weights named by ``pretrained_cfg_overlay={"file": ...}``.
        settings: fields of :class:`mrmae_ds.models.sizes.CViTSpec`, arguments of
            :class:`mrmae_ds.models.cvit.CViT`, and arguments of timm's ``create_model``.

    Raises:
        UserError: for a field's wrong value, an ``img_size`` that the patches do not tile, an unknown ``global_pool``.
    """
    return _create("cvit_base", pretrained, settings)


@register_model
def cvit_large(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Create a CViT-Large, stride 16; see :func:`cvit_base`."""
    return _create("cvit_large", pretrained, settings)


@register_model
def cvit_huge(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Create a CViT-Huge, stride 14; see :func:`cvit_base`."""
    return _create("cvit_huge", pretrained, settings)
