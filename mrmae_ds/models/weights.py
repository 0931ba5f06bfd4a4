"""Weights of this project in and out: one safetensors file that says what it holds.

The metadata entry ``mrmae`` is JSON: kind (``pretrain`` or ``classifier``), encoder spec, image size, classes, input
statistics, and whatever the writer adds (recipe, step, metrics).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.files import replacing
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.foreign import (
    FAMILY_TITLES,
    METADATA_KEY,
    PIXEL_HEAD,
    Identity,
    decoder_sizes,
    identify,
    size_differences,
    spec_sizes,
)
from mrmae_ds.models.positions import resize_positions
from mrmae_ds.models.pretrain import Encoder, PretrainModel
from mrmae_ds.models.sizes import FAMILIES, CViTSpec, EncoderSpec, make_spec
from mrmae_ds.models.tensor_files import TensorFile, read_tensor_file
from mrmae_ds.models.vit import MaskableViT
from mrmae_ds.objectives import PIXELS

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
        save_file(contiguous, temporary, metadata={"format": "pt", METADATA_KEY: json.dumps(metadata)})


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
    if METADATA_KEY not in metadata:
        raise UserError(f"{path}: a safetensors file, but not one written by this project (no 'mrmae' metadata)")
    return json.loads(metadata[METADATA_KEY])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def load_encoder(encoder: Encoder, path: Path) -> LoadReport:
    """Load the encoder that a file holds into ``encoder``, resizing positions to its grid.

    Args:
        encoder: bare or with a head; a head in the file is loaded only if its shape is the model's and it reads, as
            ours does, the mean of the patches.
        path: a file of this project, or a released one of MCMAE, MAE or a plain ViT (see :mod:`..foreign`), as
            safetensors or torch's pickle.

    Returns:
        What was loaded, by the encoder's names (``unexpected`` by the file's); ``missing`` is at most the head and
        ``fc_norm``.

    Raises:
        UserError: if the file cannot be read, or its encoder is another one; it names what differs.
    """
    file = read_tensor_file(path)
    found = identify(file)
    check_encoder(found, encoder.spec, path)
    incoming, report = _matched(file, found, encoder.state_dict(), encoder, "encoder.")
    if any(not name.startswith(("head.", "fc_norm.")) for name in report.missing):
        raise UserError(f"{path}: encoder tensors are missing: {report}")
    encoder.load_state_dict(incoming, strict=False)
    return report


def load_pretrained(model: PretrainModel, path: Path) -> LoadReport:
    """Load all of a pre-training that a file holds: encoder, fusion, decoder, heads.

    A released file's pixel head goes to the first objective that reconstructs pixels at the decoder. The decoder's
    fixed positions are never taken, the encoder's are resized to its grid.

    Args:
        model: of any objectives; heads, fusion and decoder that the file lacks keep what they have.
        path: as for :func:`load_encoder`.

    Returns:
        What was loaded, by the model's names (``unexpected`` by the file's).

    Raises:
        UserError: if the file cannot be read, or its encoder or decoder is another one; it names what differs.
    """
    file = read_tensor_file(path)
    found = identify(file)
    check_encoder(found, model.encoder.spec, path)
    own = model.state_dict()
    own.pop("decoder.pos_embed", None)
    shapes = {ours: tuple(file.tensors[name].shape) for name, ours in found.names.items()}
    sizes = decoder_sizes({name: tuple(tensor.shape) for name, tensor in own.items()})
    if sizes and (differences := size_differences(decoder_sizes(shapes), sizes)):
        raise UserError(f"{path}: another decoder than the recipe's: {'; '.join(differences)}; set model.decoder to it")
    if not found.ours:
        pixels = (name for name, spec in model.objectives.items() if (spec.target, spec.tap) == (PIXELS, "decoder"))
        head = f"heads.{next(pixels, '')}."
        names = {name: ours.replace(PIXEL_HEAD, head) for name, ours in found.names.items()}
        found = replace(found, names=names)
    incoming, report = _matched(file, found, own, model.encoder, "")
    if any(name.startswith("encoder.") and name != "encoder.pos_embed" for name in report.missing):
        raise UserError(f"{path}: encoder tensors are missing: {report}")
    model.load_state_dict(incoming, strict=False)
    return report


def check_encoder(found: Identity, wanted: EncoderSpec, path: Path) -> None:
    """Refuse a file whose encoder is not ``wanted``.

    Raises:
        UserError: naming every size that differs.
    """
    family = next(name for name, kind in FAMILIES.items() if isinstance(wanted, kind))
    if found.family != family:
        raise UserError(f"{path}: holds {found.title}, but the recipe's model is a {FAMILY_TITLES[family]}")
    if found.extras:
        raise UserError(
            f"{path}: holds a ViT with more than the plain one has ({', '.join(found.extras[:6])}), which would "
            "compute something else here; it can be a teacher (kind: timm)"
        )
    if differences := size_differences(found.sizes, spec_sizes(wanted)):
        raise UserError(
            f"{path}: another encoder than the recipe's: {'; '.join(differences)}; "
            "take another file, or set model.arch and model.overrides to this one's sizes"
        )


def _matched(
    file: TensorFile, found: Identity, own: dict[str, Tensor], encoder: Encoder, prefix: str
) -> tuple[dict[str, Tensor], LoadReport]:
    """The file's tensors that ``own`` takes, by its names, positions resized; and what became of each.

    ``own``'s names are those of a pre-training model that start with ``prefix``, without it.
    """
    report, incoming = LoadReport(), {}
    for name, tensor in file.tensors.items():
        full = found.names.get(name, "")
        ours = full.removeprefix(prefix)
        if not full.startswith(prefix) or ours not in own:
            report.unexpected.append(name)
            continue
        if full == "encoder.pos_embed":
            fitted = _fit_positions(tensor, found, encoder, file.path)
            if fitted.shape != tensor.shape:
                report.resized.append(ours)
            tensor = fitted
        if tensor.shape != own[ours].shape:
            if not full.startswith(("encoder.head.", "heads.")):
                raise UserError(f"{file.path}: {name} is {tuple(tensor.shape)}, expected {tuple(own[ours].shape)}")
            report.unexpected.append(name)
            continue
        incoming[ours] = tensor
        report.loaded.append(ours)
    report.missing = [name for name in own if name not in incoming]
    return incoming, report


def _fit_positions(positions: Tensor, found: Identity, encoder: Encoder, path: Path) -> Tensor:
    """A file's positions for the encoder's class token, or lack of one, and grid."""
    wanted = encoder.num_prefix_tokens
    if found.grid is None:
        if tuple(positions.shape[1:2]) == tuple(encoder.pos_embed.shape[1:2]):
            return positions
        raise UserError(f"{path}: pos_embed is {tuple(positions.shape)}: its rows are no square grid")
    if found.prefix_rows > wanted:
        positions = positions[:, found.prefix_rows :]
    elif found.prefix_rows < wanted:  # a class token without a position is one whose position is zero
        positions = torch.cat([positions.new_zeros(1, wanted, positions.shape[2]), positions], dim=1)
    return resize_positions(positions, found.grid, encoder.grid, wanted)


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
