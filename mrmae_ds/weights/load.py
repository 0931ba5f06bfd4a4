"""Weights of this project in and out: one safetensors file that says what it holds.

The metadata entry ``mrmae`` is JSON: kind (``pretrain`` or ``classifier``), encoder spec, image size, pooling, classes,
input statistics, and whatever the writer adds (recipe, step, metrics).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.files import replacing
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.objectives import PIXELS
from mrmae_ds.models.pretrain import Encoder, PretrainModel
from mrmae_ds.models.sizes import FAMILIES, CViTSpec, EncoderSpec, ImageSize, make_spec
from mrmae_ds.models.vit import MaskedViT
from mrmae_ds.weights.formats import read_tensor_file
from mrmae_ds.weights.identify import METADATA_KEY, PIXEL_HEAD, decoder_sizes, identify, size_differences
from mrmae_ds.weights.matching import LoadReport, check_encoder, match_tensors

MODEL_FILE = "model.safetensors"


def build_encoder(
    spec: EncoderSpec,
    image_size: ImageSize,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    pool: str = "avg",
) -> Encoder:
    """The encoder of a spec.

    Args:
        spec: of a CViT or a plain ViT.
        image_size: pixels, one side of a square or (height, width).
        num_classes: of the classifier; 0 builds the bare encoder of pre-training.
        drop_path_rate: stochastic depth of the last block.
        pool: what a classifier's head sees: ``avg``, or what :class:`~mrmae_ds.models.cvit.CViT` and
            :class:`~mrmae_ds.models.vit.MaskedViT` have besides.

    Raises:
        ConfigError: if the patches do not tile ``image_size``. or for a pooling that the encoder does not have.
    """
    if isinstance(spec, CViTSpec):
        return CViT(spec, image_size, num_classes, drop_path_rate, global_pool=pool if num_classes else "")
    return MaskedViT(spec, image_size, num_classes, drop_path_rate, pool)


def build_classifier(metadata: Mapping[str, Any], image_size: ImageSize | None = None) -> Encoder:
    """The classifier that a weights file's metadata tells of, for its own or another input size; random weights.

    Raises:
        ConfigError: if the patches do not tile ``image_size``.
    """
    spec, size = spec_from_metadata(metadata), image_size or size_from_metadata(metadata)
    return build_encoder(spec, size, metadata["num_classes"], pool=metadata.get("pool", "avg"))


def encoder_metadata(encoder: Encoder) -> dict[str, Any]:
    """What is needed to build the encoder again, but for its classes."""
    height, width = (side * encoder.stride for side in encoder.grid)
    pool = {"pool": encoder.global_pool} if encoder.num_classes else {}
    return {
        "family": "cvit" if isinstance(encoder, CViT) else "vit",
        "spec": asdict(encoder.spec),
        "image_size": height if height == width else [height, width],
        **pool,
    }


def spec_from_metadata(metadata: Mapping[str, Any]) -> EncoderSpec:
    """The spec that :func:`encoder_metadata` wrote."""
    return make_spec(FAMILIES[metadata["family"]], metadata["spec"], "weights file")


def size_from_metadata(metadata: Mapping[str, Any]) -> ImageSize:
    """The input size that :func:`encoder_metadata` wrote: pixels of a square's side, or (height, width)."""
    size = metadata["image_size"]
    return size if isinstance(size, int) else tuple(size)


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


def init_classifier(model: Encoder) -> None:
    """Fine-tuning's initialization (MAE, MCMAE): trunc_normal 0.02 for linear layers, positions and the class token,
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
