"""Weights of this project in and out: one safetensors file that says what it holds.

The metadata entry ``mrmae`` is JSON: kind (``pretrain`` or ``classifier``), encoder spec, image size, classes, input
statistics, and whatever the writer adds (recipe, step, metrics).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.files import replacing
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.positions import resize_positions
from mrmae_ds.models.pretrain import Encoder
from mrmae_ds.models.sizes import FAMILIES, CViTSpec, EncoderSpec, make_spec
from mrmae_ds.models.vit import MaskableViT

MODEL_FILE = "model.safetensors"


@dataclass
class LoadReport:
    """What became of a file's tensors: names loaded, resized, missing from the file, unexpected in it."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def listed(label: str, names: list[str]) -> str:
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            return f"{label} {len(names)}" + (f" ({shown})" if names else "")

        return "; ".join(
            [
                f"loaded {len(self.loaded)} tensors",
                listed("resized", self.resized),
                listed("missing", self.missing),
                listed("not used", self.unexpected),
            ]
        )


def build_encoder(spec: EncoderSpec, image_size: int, num_classes: int = 0, drop_path_rate: float = 0.0) -> Encoder:
    """The encoder of a spec; ``num_classes=0`` is the bare one of pre-training.

    Raises:
        UserError: if the patches do not tile ``image_size``.
    """
    if isinstance(spec, CViTSpec):
        return CViT(spec, image_size, num_classes, drop_path_rate, global_pool="avg" if num_classes else "")
    return MaskableViT(spec, image_size, num_classes, drop_path_rate)


def encoder_metadata(encoder: Encoder) -> dict[str, Any]:
    """What is needed to build the encoder again."""
    family = "cvit" if isinstance(encoder, CViT) else "vit"
    return {
        "family": family,
        "spec": asdict(encoder.spec),
        "image_size": encoder.grid[0] * encoder.stride,
    }


def spec_from_metadata(metadata: dict[str, Any]) -> EncoderSpec:
    """The inverse of :func:`encoder_metadata`."""
    return make_spec(FAMILIES[metadata["family"]], metadata["spec"], "weights file")


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a weights file in one step, so that a partial one never passes for whole."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt", "mrmae": json.dumps(metadata)})


def find_weights(source: Path, key: str) -> Path:
    """The weights file of a stage folder, or ``source`` itself if it is a file.

    Raises:
        UserError: naming ``key`` and what is missing.
    """
    path = source / MODEL_FILE if source.is_dir() else source
    if not path.is_file():
        what = "has not finished (no model.safetensors)" if source.is_dir() else "does not exist"
        raise UserError(
            f"{key}: {source} {what}; run that stage first, or name a stage folder (runs/NAME/STAGE) or a model file"
        )
    return path


def read_metadata(path: Path) -> dict[str, Any]:
    """The ``mrmae`` metadata of a weights file.

    Raises:
        UserError: if it is not a weights file of this project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    if "mrmae" not in metadata:
        raise UserError(f"{path}: a safetensors file, but not one written by this project (no 'mrmae' metadata)")
    return json.loads(metadata["mrmae"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def load_encoder(encoder: Encoder, path: Path) -> LoadReport:
    """Load the encoder part of a weights file into ``encoder``, resizing positions to its grid.

    Args:
        encoder: bare or with a head; a head in the file is loaded only if its shape is the model's.
        path: a file of :func:`save_weights`, of either kind.

    Returns:
        What was loaded; ``missing`` is at most the head and ``fc_norm``.

    Raises:
        UserError: if the file's encoder is another one.
    """
    metadata = read_metadata(path)
    saved, wanted = spec_from_metadata(metadata), encoder.spec
    if saved != wanted:
        raise UserError(f"{path}: holds an encoder {saved}, but the recipe's model is {wanted}")
    prefix = "encoder." if metadata["kind"] == "pretrain" else ""
    report = LoadReport()
    own = encoder.state_dict()
    incoming: dict[str, Tensor] = {}
    old_grid = (metadata["image_size"] // encoder.stride,) * 2
    for full_name, tensor in read_tensors(path).items():
        name = full_name.removeprefix(prefix)
        if not full_name.startswith(prefix) or name not in own:
            report.unexpected.append(full_name)
            continue
        if name == "pos_embed" and old_grid != encoder.grid:
            split = encoder.num_prefix_tokens
            patches = resize_positions(tensor[:, split:], old_grid, encoder.grid)
            tensor = torch.cat([tensor[:, :split], patches], dim=1)
            report.resized.append(name)
        if tensor.shape != own[name].shape:
            if not name.startswith("head."):
                raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
            report.unexpected.append(full_name)
            continue
        incoming[name] = tensor
        report.loaded.append(name)
    report.missing = [name for name in own if name not in incoming]
    if any(not name.startswith(("head.", "fc_norm.")) for name in report.missing):
        raise UserError(f"{path}: encoder tensors are missing: {report}")
    encoder.load_state_dict(incoming, strict=False)
    return report


def init_classifier(model: Encoder) -> None:
    """Fine-tuning's initialisation (MAE, MCMAE): trunc_normal 0.02 for linear layers, positions and the class token,
    2e-5 for the head.

    Loading a pre-trained encoder replaces all of it but the head.
    """
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    if model.num_prefix_tokens:
        nn.init.trunc_normal_(model.cls_token, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    head = model.head
    assert isinstance(head, nn.Linear)
    nn.init.trunc_normal_(head.weight, std=2e-5)
