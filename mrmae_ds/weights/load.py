"""Load weights of any origin into this project's models: match names, resize position embeddings, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import Encoder, build_encoder
from mrmae_ds.models.objectives import PIXELS, Objective
from mrmae_ds.models.pos_embed import resize_pos_embed
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import FAMILIES, EncoderSpec
from mrmae_ds.weights.formats import read_tensor_file
from mrmae_ds.weights.identify import (
    FAMILY_TITLES,
    PIXEL_HEAD,
    WeightIdentity,
    decoder_sizes,
    identify,
    size_differences,
    spec_sizes,
)
from mrmae_ds.weights.model_file import (
    build_classifier,
    read_metadata,
    read_tensors,
    size_from_metadata,
    spec_from_metadata,
)


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


def load_encoder(encoder: Encoder, path: Path, key: str = "") -> LoadReport:
    """Load the encoder that a file holds into ``encoder``, resizing positions to its grid.

    Args:
        encoder: bare or with a head; a head in the file is loaded only if its shape is the model's and it sees what the
            model's sees, the mean of the patches or the class token. The norm of a pre-training becomes the norm before
            the class token's head (MAE's fine-tuning).
        path: a file of this project, or a released one of MCMAE, MAE or a plain ViT (see :mod:`..foreign`), as
            safetensors or torch's pickle.
        key: the recipe key that named the file, for errors.

    Returns:
        What was loaded, by the encoder's names (``unexpected`` by the file's); ``missing`` is at most the head and
        the norm before it.

    Raises:
        UserError: if the file cannot be read, or its encoder is another one; it names what differs.
    """
    file, where = read_tensor_file(path, key), f"{key}: {path}" if key else str(path)
    found = identify(file)
    check_encoder(found, encoder.spec, where)
    names = found.names
    if found.pool != encoder.global_pool:
        names = {name: ours for name, ours in names.items() if not ours.startswith("encoder.head.")}
    if encoder.global_pool == "token":
        names = {name: ours.replace("fusion.norm.", "encoder.norm.") for name, ours in names.items()}
    found = replace(found, names=names)
    incoming, report = match_tensors(file.tensors, found, encoder.state_dict(), encoder, where, "encoder.")
    if any(not name.startswith(("head.", "fc_norm.", "norm.")) for name in report.missing):
        raise UserError(f"{where}: encoder tensors are missing: {report}")
    encoder.load_state_dict(incoming, strict=False)
    return report


def load_pretrained(model: PretrainModel, path: Path, key: str = "") -> LoadReport:
    """Load all of a pre-training that a file holds: encoder, fusion, decoder, heads.

    A released file's pixel head goes to the first objective that reconstructs pixels at the decoder. The decoder's
    fixed positions are never taken, the encoder's are resized to its grid.

    Args:
        model: of any objectives; heads, fusion and decoder that the file lacks keep what they have.
        path, key: as for :func:`load_encoder`.

    Returns:
        What was loaded, by the model's names (``unexpected`` by the file's).

    Raises:
        UserError: if the file cannot be read, or its encoder or decoder is another one; it names what differs.
    """
    file, where = read_tensor_file(path, key), f"{key}: {path}" if key else str(path)
    found = identify(file)
    check_encoder(found, model.encoder.spec, where)
    own = model.state_dict()
    own.pop("decoder.pos_embed", None)
    shapes = {ours: tuple(file.tensors[name].shape) for name, ours in found.names.items()}
    sizes = decoder_sizes({name: tuple(tensor.shape) for name, tensor in own.items()})
    if sizes and (differences := size_differences(decoder_sizes(shapes), sizes)):
        raise UserError(
            f"{where}: another decoder than the recipe's: {'; '.join(differences)}; set model.decoder to it"
        )
    if not found.ours:
        pixels = (name for name, spec in model.objectives.items() if (spec.target, spec.tap) == (PIXELS, "decoder"))
        head = f"heads.{next(pixels, '')}."
        names = {name: ours.replace(PIXEL_HEAD, head) for name, ours in found.names.items()}
        found = replace(found, names=names)
    incoming, report = match_tensors(file.tensors, found, own, model.encoder, where)
    if any(name.startswith("encoder.") and name != "encoder.pos_embed" for name in report.missing):
        raise UserError(f"{where}: encoder tensors are missing: {report}")
    model.load_state_dict(incoming, strict=False)
    return report


def load_model(path: Path | str) -> Encoder | PretrainModel:
    """The model of a weights file of this project, whole and in eval mode: a classifier, or a pre-training.

    Raises:
        UserError: if it is another file, or an encoder that was exported for timm.
    """
    path = Path(path)
    metadata, tensors = read_metadata(path), read_tensors(path)
    if metadata["kind"] not in ("classifier", "pretrain"):
        raise UserError(f"{path}: holds an encoder for timm: {metadata.get('create_model', 'see mrmae check')}")
    try:
        model = _built(metadata, tensors)
    except (KeyError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: its tensors are not those that its metadata tells of ({first})") from None
    return model.eval()


def _built(metadata: Mapping[str, Any], tensors: dict[str, Tensor]) -> Encoder | PretrainModel:
    """The model that a weights file is of, with its tensors. Raises what torch raises if they are another's."""
    if metadata["kind"] == "classifier":
        classifier = build_classifier(metadata)
        classifier.load_state_dict(tensors)
        return classifier
    recipe = metadata["recipe"]
    stage = recipe["stages"]["pretrain"]
    objectives = {name: Objective.model_validate(values) for name, values in stage["objectives"].items()}
    fusion = FusionSpec.model_validate(recipe["model"]["fusion"])
    decoder = DecoderSpec.model_validate(recipe["model"]["decoder"])
    encoder = build_encoder(spec_from_metadata(metadata), size_from_metadata(metadata))
    return PretrainModel.of_tensors(encoder, fusion, decoder, objectives, tensors)


def check_encoder(found: WeightIdentity, wanted: EncoderSpec, where: str) -> None:
    """Refuse a file whose encoder is not ``wanted``; ``where`` names the file, for errors.

    Raises:
        UserError: naming every size that differs.
    """
    family = next(name for name, kind in FAMILIES.items() if isinstance(wanted, kind))
    if found.family != family:
        raise UserError(f"{where}: holds {found.title}, but the recipe's model is a {FAMILY_TITLES[family]}")
    if found.extras:
        raise UserError(
            f"{where}: holds a ViT with more than the plain one has ({', '.join(found.extras[:6])}), which would "
            "compute something else here; it can be a teacher (kind: timm)"
        )
    if differences := size_differences(found.sizes, spec_sizes(wanted)):
        raise UserError(
            f"{where}: another encoder than the recipe's: {'; '.join(differences)}; "
            "take another file, or set model.arch and model.overrides to this one's sizes"
        )


def match_tensors(
    tensors: Mapping[str, Tensor],
    found: WeightIdentity,
    own: Mapping[str, Tensor],
    encoder: Encoder,
    where: str,
    prefix: str = "",
) -> tuple[dict[str, Tensor], LoadReport]:
    """A file's tensors that ``own`` takes, by its names, positions resized; and what became of each.

    Args:
        tensors: by the file's names.
        found: what the file is.
        own: the model's; its names are those of a pre-training model that start with ``prefix``, without it.
        encoder: whose class token and grid the positions must fit.
        where: names the file, for errors.
        prefix: of the names in a pre-training model.

    Raises:
        UserError: for a tensor of another shape, but for a head's, which is left out.
    """
    report, incoming = LoadReport(), {}
    for name, tensor in tensors.items():
        full = found.names.get(name, "")
        ours = full.removeprefix(prefix)
        if not full.startswith(prefix) or ours not in own:
            report.unexpected.append(name)
            continue
        if full == "encoder.pos_embed":
            fitted = fit_pos_embed(tensor, found, encoder, where)
            if fitted.shape != tensor.shape:
                report.resized.append(ours)
            tensor = fitted
        if tensor.shape != own[ours].shape:
            if not full.startswith(("encoder.head.", "heads.")):
                raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(own[ours].shape)}")
            report.unexpected.append(name)
            continue
        incoming[ours] = tensor
        report.loaded.append(ours)
    report.missing = [name for name in own if name not in incoming]
    return incoming, report


def fit_pos_embed(positions: Tensor, found: WeightIdentity, encoder: Encoder, where: str) -> Tensor:
    """A file's positions [1, rows, C] for the encoder's class token, or lack of one, and its grid.

    Raises:
        UserError: if the rows are those of no grid that is known.
    """
    wanted = encoder.num_prefix_tokens
    if found.grid is None:
        if tuple(positions.shape[1:2]) == tuple(encoder.pos_embed.shape[1:2]):
            return positions
        raise UserError(
            f"{where}: pos_embed is {tuple(positions.shape)}: its rows are no square grid, and the model's are "
            f"{encoder.grid[0]} x {encoder.grid[1]}"
        )
    if found.prefix_rows > wanted:
        positions = positions[:, found.prefix_rows :]
    elif found.prefix_rows < wanted:  # a class token without a position is one whose position is zero
        positions = torch.cat([positions.new_zeros(1, wanted, positions.shape[2]), positions], dim=1)
    return resize_pos_embed(positions, found.grid, encoder.grid, wanted)
