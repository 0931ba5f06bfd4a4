"""Load weights of any origin into this project's models: match names, resize position embeddings, report."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import Encoder, build_encoder
from mrmae_ds.models.objectives import PIXELS, Objective
from mrmae_ds.models.pos_embed import resize_pos_embed
from mrmae_ds.models.pretrain import AVERAGES, FusionSpec, PretrainModel
from mrmae_ds.units import counted, first_few
from mrmae_ds.weights.identify import PIXEL_HEAD, WeightIdentity
from mrmae_ds.weights.model_file import (
    build_classifier,
    read_metadata,
    read_tensors,
    size_from_metadata,
    spec_from_metadata,
)
from mrmae_ds.weights.resolve import Weights, resolve
from mrmae_ds.weights.shapes import SHARED_TABLE, TABLE, decoder_sizes, size_differences


@dataclass
class LoadReport:
    """Names of tensors by the outcome of loading a file.

    Attributes:
        loaded: loaded into the model, by its names.
        resized: those of them that were resized.
        missing: tensors of the model that the file lacks.
        unexpected: tensors of the file that were not used, by its names.
        notes: choice of the weights, conversion of their names, and what could not be verified.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def listed(label: str, names: list[str]) -> str:
            return f"{label} {len(names)}" + (f" ({first_few(names, 6)})" if names else "")

        return "; ".join(
            [
                f"loaded {counted(len(self.loaded), 'tensor')}",
                listed("resized", self.resized),
                listed("missing", self.missing),
                listed("not used", self.unexpected),
                *self.notes,
            ]
        )


def load_encoder(encoder: Encoder, path: Path, key: str = "") -> LoadReport:
    """Load the encoder in a file into ``encoder``; its positions are resized to its grid.

    A table of relative positions that a BEiT's blocks share in pre-training is copied into each block.

    Args:
        encoder: encoder with or without a head. A head in the file is loaded only if it has the same shape and pooling
            (mean of the patches or class token) as the model's. The norm of a pre-training becomes the norm before the
            class token's head (MAE's fine-tuning).
        path: file of this project, or one released by MCMAE, MAE or for a plain ViT, in any form of docs/weights.md.
        key: recipe key that named the file, for errors.

    Returns:
        Report by the encoder's names; ``missing`` contains at most the head, the norm before it, and the relative
        positions of a windowed encoder, which keep their values.

    Raises:
        UserError: if the file cannot be read, or its encoder differs from ``encoder``; it names the differences.
    """
    return load_encoder_weights(encoder, resolve(path, key))


def load_encoder_weights(encoder: Encoder, weights: Weights) -> LoadReport:
    """Load a resolved file into ``encoder``, as :func:`load_encoder` does."""
    state = encoder.state_dict()
    weights.check_encoder(encoder.spec, any(name.endswith(".rel_pos_h") for name in state))
    identity, where = weights.identity, weights.where
    names, notes = identity.names, weights.notes()
    if identity.pool != encoder.global_pool:
        names = {name: ours for name, ours in names.items() if not ours.startswith("encoder.head.")}
        if identity.num_classes and encoder.num_classes:
            notes.append(f"head left out: its input is {identity.pool or 'unknown'}, the model's {encoder.global_pool}")
    if encoder.global_pool == "token":
        names = {name: ours.replace("fusion.norm.", "encoder.norm.") for name, ours in names.items()}
    identity = replace(identity, names=names)
    tensors = dict(weights.file.tensors)
    own = [name for name in state if name.startswith("blocks.") and name.endswith(TABLE)]
    shared = next((name for name, ours in names.items() if ours == f"encoder.{SHARED_TABLE}"), "")
    if own and shared:
        table = tensors.pop(shared)
        tensors |= dict.fromkeys(own, table)
        identity = replace(identity, names=names | {name: f"encoder.{name}" for name in own})
    incoming, report = match_tensors(tensors, identity, state, encoder, where, "encoder.")
    if "head.weight" in incoming and "head.bias" in report.missing:
        incoming["head.bias"] = torch.zeros_like(state["head.bias"])
        report.missing.remove("head.bias")
        notes.append("head without a bias, which is zero")
    if "cls_token" in report.missing:
        raise UserError(f"{where}: has no class token (cls_token), which pool: token takes; use pool: avg")
    optional = re.compile(r"(?:head|fc_norm|norm)\.|.*\.rel_pos_[hw]$")
    if not all(map(optional.match, report.missing)):
        raise UserError(f"{where}: encoder tensors are missing: {report}")
    encoder.load_state_dict(incoming, strict=False)  # what is missing was checked
    report.notes = notes
    return report


def load_pretrained(model: PretrainModel, path: Path, key: str = "") -> LoadReport:
    """Load all modules of a pre-training that a file contains: encoder, fusion, decoder, heads.

    The pixel head of a released file is loaded into the first objective that reconstructs pixels at the decoder. The
    decoder's fixed position embedding is never loaded; the encoder's is resized to its grid. Moving averages of the
    encoder start at its new weights.

    Args:
        model: model with any objectives; heads, fusion and decoder that the file lacks keep their values.
        path: file as for :func:`load_encoder`.
        key: recipe key that named the file, for errors.

    Returns:
        Report by the model's names.

    Raises:
        UserError: if the file cannot be read, or its encoder or decoder differs from the model's; it names the
            differences.
    """
    weights = resolve(path, key)
    weights.check_encoder(model.encoder.spec)
    file, identity, where = weights.file, weights.identity, weights.where
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(AVERAGES)}
    state.pop("decoder.pos_embed", None)
    shapes = {ours: tuple(file.tensors[name].shape) for name, ours in identity.names.items()}
    sizes = decoder_sizes({name: tuple(tensor.shape) for name, tensor in state.items()})
    if sizes and (differences := size_differences(decoder_sizes(shapes), sizes)):
        raise UserError(
            f"{where}: its decoder differs from the recipe's: {'; '.join(differences)}; change model.decoder"
        )
    if not identity.ours:
        pixels = (name for name, spec in model.objectives.items() if (spec.target, spec.tap) == (PIXELS, "decoder"))
        head = f"heads.{next(pixels, '')}."
        names = {name: ours.replace(PIXEL_HEAD, head) for name, ours in identity.names.items()}
        identity = replace(identity, names=names)
    incoming, report = match_tensors(file.tensors, identity, state, model.encoder, where)
    optional = ("encoder.pos_embed", "encoder.mask_token")
    if any(name.startswith("encoder.") and name not in optional for name in report.missing):
        raise UserError(f"{where}: encoder tensors are missing: {report}")
    model.load_state_dict(incoming, strict=False)  # what is missing was checked, or is reported
    model.reset_averages()
    report.notes = weights.notes()
    return report


def load_model(path: Path | str) -> Encoder | PretrainModel:
    """Build the complete model of a model file of this project, in eval mode.

    Returns:
        A classifier or a pre-training model.

    Raises:
        UserError: if it is not a model file, or an encoder exported for timm.
    """
    path = Path(path)
    metadata, tensors = read_metadata(path), read_tensors(path)
    if metadata["kind"] not in ("classifier", "pretrain"):
        raise UserError(f"{path}: contains an encoder for timm: {metadata.get('create_model', 'see mrmae check')}")
    try:
        model = _built(metadata, tensors)
    except (KeyError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: its tensors do not match its metadata ({first})") from None
    return model.eval()


def _built(metadata: Mapping[str, Any], tensors: dict[str, Tensor]) -> Encoder | PretrainModel:
    """Build the model of a file and load its tensors; exceptions of torch are not caught."""
    if metadata["kind"] == "classifier":
        classifier = build_classifier(metadata)
        classifier.load_state_dict(tensors)
        return classifier
    recipe = metadata["recipe"]
    stage = recipe["stages"]["pretrain"]
    objectives = {name: Objective.model_validate(values) for name, values in stage["objectives"].items()}
    fusion = FusionSpec.model_validate(recipe["model"]["fusion"])
    decoder = DecoderSpec.model_validate(recipe["model"]["decoder"])
    mask_token = "encoder.mask_token" in tensors
    encoder = build_encoder(spec_from_metadata(metadata), size_from_metadata(metadata), mask_token=mask_token)
    return PretrainModel.of_tensors(encoder, fusion, decoder, objectives, tensors)


def match_tensors(
    tensors: Mapping[str, Tensor],
    identity: WeightIdentity,
    state: Mapping[str, Tensor],
    encoder: Encoder,
    where: str,
    prefix: str = "",
) -> tuple[dict[str, Tensor], LoadReport]:
    """Match checkpoint tensors to model parameters; positions are resized.

    Args:
        tensors: tensors of the file, by its names.
        identity: identity of the file.
        state: tensors of the model; their names with ``prefix`` are those in a pre-training model.
        encoder: encoder of the model.
        where: name of the file, for errors.
        prefix: prefix of the model's names in a pre-training model.

    Returns:
        The matched tensors by the model's names, and the report.

    Raises:
        UserError: for a tensor of another shape, except those of a head, which are left out.
    """
    report, incoming = LoadReport(), {}
    for name, tensor in tensors.items():
        full = identity.names.get(name, "")
        ours = full.removeprefix(prefix)
        if not full.startswith(prefix) or ours not in state:
            report.unexpected.append(name)
            continue
        if full == "encoder.pos_embed":
            fitted = fit_pos_embed(tensor, identity, encoder, where)
            if fitted.shape != tensor.shape:
                report.resized.append(ours)
            tensor = fitted
        elif full.endswith(TABLE) and tensor.shape != state[ours].shape:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about timm's way to index; results are compared in tests
                tensor = resize_rel_pos_bias_table(tensor, encoder.grid, state[ours].shape, identity.grid)
            report.resized.append(ours)
        if tensor.shape != state[ours].shape:
            if not full.startswith(("encoder.head.", "heads.")):
                raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(state[ours].shape)}")
            report.unexpected.append(name)
            continue
        incoming[ours] = tensor
        report.loaded.append(ours)
    report.missing = [name for name in state if name not in incoming]
    return incoming, report


def fit_pos_embed(pos_embed: Tensor, identity: WeightIdentity, encoder: Encoder, where: str) -> Tensor:
    """Convert a file's position embedding to the prefix tokens and grid of an encoder.

    Args:
        pos_embed: position embedding of the file, [1, rows, C].
        identity: identity of the file.
        encoder: encoder to fit.
        where: name of the file, for errors.

    Returns:
        Position embedding [1, P + L, C] for P prefix tokens and L tokens of the encoder's grid.

    Raises:
        UserError: if the rows form no known grid.
    """
    prefix_tokens = encoder.num_prefix_tokens
    if identity.grid is None:
        if tuple(pos_embed.shape[1:2]) == tuple(encoder.pos_embed.shape[1:2]):
            return pos_embed
        raise UserError(
            f"{where}: pos_embed is {tuple(pos_embed.shape)}: its rows do not form a square grid, and the model's "
            f"grid is {encoder.grid[0]} x {encoder.grid[1]}"
        )
    if identity.prefix_rows > prefix_tokens:
        pos_embed = pos_embed[:, identity.prefix_rows :]
    elif identity.prefix_rows < prefix_tokens:  # a class token without a position embedding has a zero one
        pos_embed = torch.cat([pos_embed.new_zeros(1, prefix_tokens, pos_embed.shape[2]), pos_embed], dim=1)
    return resize_pos_embed(pos_embed, identity.grid, encoder.grid, prefix_tokens)
