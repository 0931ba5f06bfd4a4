"""This project's model file: safetensors with a metadata entry that describes the model.

The entry ``mrmae`` is JSON: kind (``pretrain`` or ``classifier``), encoder spec, image size, pooling, classes, input
statistics, and entries that the writer adds (recipe, step, metrics).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.files import replacing
from mrmae_ds.models.encoders import Encoder, build_encoder
from mrmae_ds.models.sizes import FAMILIES, EncoderSpec, ImageSize, family_of, make_spec
from mrmae_ds.weights.formats import read_safetensors
from mrmae_ds.weights.identify import METADATA_KEY
from mrmae_ds.weights.paths import MODEL_FILE
from mrmae_ds.weights.resolve import unusable_tensors


def build_classifier(metadata: Mapping[str, Any], image_size: ImageSize | None = None) -> Encoder:
    """Build the classifier that a model file's metadata describes, with random weights.

    Args:
        metadata: metadata of the file.
        image_size: input size in pixels, one side of a square or (height, width); None uses the file's.

    Raises:
        ConfigError: if the patches do not tile ``image_size``.
    """
    spec, size = spec_from_metadata(metadata), image_size or size_from_metadata(metadata)
    return build_encoder(spec, size, metadata["num_classes"], pool=metadata.get("pool", "avg"))


def encoder_metadata(encoder: Encoder) -> dict[str, Any]:
    """Return the metadata for rebuilding an encoder, except its number of classes."""
    height, width = (side * encoder.stride for side in encoder.grid)
    pool = {"pool": encoder.global_pool} if encoder.num_classes else {}
    return {
        "family": family_of(encoder.spec),
        "spec": asdict(encoder.spec),
        "image_size": height if height == width else [height, width],
        **pool,
    }


def spec_from_metadata(metadata: Mapping[str, Any]) -> EncoderSpec:
    """Return the spec in metadata of :func:`encoder_metadata`."""
    return make_spec(FAMILIES[metadata["family"]], metadata["spec"], "weights file")


def size_from_metadata(metadata: Mapping[str, Any]) -> ImageSize:
    """Return the input size in metadata of :func:`encoder_metadata`: pixels of a square's side, or (height, width)."""
    size = metadata["image_size"]
    return size if isinstance(size, int) else tuple(size)


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a model file atomically.

    Args:
        path: file to write or replace.
        tensors: tensors by name, on any device.
        metadata: JSON-serializable description of the model.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt", METADATA_KEY: json.dumps(metadata)})


def run_folder_name(path: Path, stage: str) -> str | None:
    """Return the name of the run folder that holds a stage's model file, or None for a file elsewhere.

    Seeds of a recipe share the recipe's name, so only the folder's name distinguishes the runs.

    Args:
        path: model file, ``runs/NAME/STAGE/model.safetensors`` if it lies in a run.
        stage: name of the stage that wrote it.
    """
    folder = path.resolve().parent
    return folder.parent.name if path.name == MODEL_FILE and folder.name == stage else None


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the ``mrmae`` metadata of a model file.

    Raises:
        UserError: if it is not a model file of this project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: not a model file of this project (model.safetensors); name a finished stage, runs/NAME/STAGE"
            ) from None
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    if METADATA_KEY not in metadata:
        raise UserError(f"{path}: a safetensors file, but not one written by this project (no 'mrmae' metadata)")
    return json.loads(metadata[METADATA_KEY])


def is_ours(path: Path) -> bool:
    """Return True for a model file of this project; only its header is read."""
    try:
        read_metadata(path)
    except UserError:
        return False
    return True


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a model file by name, on the CPU.

    Raises:
        UserError: if a value is NaN or infinite.
    """
    tensors = read_safetensors(path)[0]
    if problem := unusable_tensors(tensors):
        raise UserError(f"{path}: {problem}")
    return tensors
