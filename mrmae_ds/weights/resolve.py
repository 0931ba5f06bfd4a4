"""Resolve a weights file: its tensors by known names, its identity, and the verdict that check and loading share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.sizes import FAMILIES, BeitSpec, EncoderSpec, family_of, make_spec
from mrmae_ds.units import counted, first_few
from mrmae_ds.weights.formats import TensorFile, read_tensor_file
from mrmae_ds.weights.identify import FAMILY_TITLES, WeightIdentity, identify
from mrmae_ds.weights.names import canonical, describe_names
from mrmae_ds.weights.origin import find_origin
from mrmae_ds.weights.shapes import size_differences, spec_sizes

RELATIVE = (
    "contains the encoder of a detector, whose windows and relative positions (rel_pos) other encoders lack, so that "
    "its results would differ here; use it in stages.detect.init, or a whole detector by mrmae detect, evaluation and "
    "mrmae export --to safetensors"
)
_PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_INDICES = {torch.int64, torch.bool}  # of buffers: positions, counts, masks


@dataclass(frozen=True)
class Weights:
    """A weights file with canonical names.

    Attributes:
        file: its tensors; of a detector, those of its encoder.
        raw: all tensors as stored.
        identity: their architecture and origin.
        source: the file as it was named, with ``#KEY``.
        where: key and source, for errors.
        unusable: tensors whose values cannot be used, in words; "" if there are none.
    """

    file: TensorFile
    raw: TensorFile
    identity: WeightIdentity
    source: Path
    where: str
    unusable: str

    @property
    def problem(self) -> str:
        """Reason why no loader takes the file; "" if it is usable."""
        return self.unusable or self.identity.problem

    def check_usable(self) -> None:
        """Check that the file is complete and finite.

        Raises:
            UserError: if it is not.
        """
        if self.problem:
            raise UserError(f"{self.where}: {self.problem}")

    def check_encoder(self, spec: EncoderSpec, relative: bool = False) -> None:
        """Check that the file has an encoder of a spec that this project's models compute.

        Args:
            spec: of the model.
            relative: the model has relative positions (of a detector).

        Raises:
            UserError: naming every size that differs.
        """
        identity, family = self.identity, family_of(spec)
        if identity.family != family:
            raise UserError(
                f"{self.where}: contains {identity.title}, but the recipe's model is a {FAMILY_TITLES[family]}"
            )
        self.check_usable()
        self.check_plain(relative)
        found, origin = dict(identity.sizes), identity.origin
        by = f" (num_heads by {origin.heads_by}; a config.json beside the file with num_attention_heads overrules it)"
        if origin.num_heads is not None:
            found["num_heads"] = origin.num_heads
        if isinstance(spec, BeitSpec) and found["relative_positions"] == "shared":
            del found["relative_positions"]  # a shared table fits every block's own
        if differences := size_differences(found, spec_sizes(spec)):
            stated = by if not identity.ours and any(text.startswith("num_heads") for text in differences) else ""
            raise UserError(
                f"{self.where}: its encoder differs from the recipe's: {'; '.join(differences)}{stated}; "
                "use another file, or set model.arch and model.overrides to these sizes"
            )

    def check_plain(self, relative: bool = False) -> None:
        """Check that the encoder has no tensors that this project's lacks.

        Args:
            relative: it may have the relative positions of a detector's encoder.

        Raises:
            UserError: naming them.
        """
        if self.identity.relative and not relative:
            raise UserError(f"{self.where}: {RELATIVE}")
        if self.identity.extras:
            raise UserError(
                f"{self.where}: contains a ViT with tensors that a plain ViT lacks "
                f"({', '.join(self.identity.extras[:6])}), so that its results would differ here; use it as a teacher "
                "(kind: timm)"
            )

    def notes(self) -> list[str]:
        """Describe the choice of weights, the conversion of names, and what could not be verified."""
        heads = [text for text in self.identity.origin.unverified() if "heads" in text]
        return describe_names(self.file) + (heads if self.identity.family else [])


def resolve(source: Path, key: str = "") -> Weights:
    """Read and identify a weights file of any origin.

    Args:
        source: the file; ``FILE#KEY`` if it holds several sets of weights.
        key: recipe key that named it, for errors.

    Raises:
        UserError: if it cannot be read, contains code, or holds several networks and none was chosen.
    """
    where = f"{key}: {source}" if key else str(source)
    raw = read_tensor_file(source, key)
    try:
        file = canonical(raw)
        identity = identify(file)
        if identity.kind != "unknown":
            origin = find_origin(
                file, identity.metadata, identity.family, identity.sizes, identity.num_classes, not identity.extras
            )
            identity = replace(identity, origin=origin)
    except UserError as error:
        raise UserError(f"{key}: {error}" if key else str(error)) from None
    return Weights(file, raw, identity, source, where, unusable_tensors(file.tensors))


def unusable_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a description of weights that are quantized, and of tensors with NaN or infinite values; "" for none."""
    if unreal := [name for name, t in tensors.items() if t.layout != torch.strided or t.is_meta]:
        return f"{counted(len(unreal), 'tensor')} sparse or without values: {first_few(unreal, 3)}"
    quantized = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in _PLAIN and (tensor.dtype not in _INDICES or name.endswith((".weight", ".bias")))
    ]
    if quantized:
        kind = str(tensors[quantized[0]].dtype).removeprefix("torch.")
        count = counted(len(quantized), "tensor")
        return f"{count} quantized ({kind}): {first_few(quantized, 3)}; use the original weights"
    nonfinite = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    return f"{counted(len(nonfinite), 'tensor')} with NaN or infinity: {first_few(nonfinite, 3)}" if nonfinite else ""


def model_metadata(
    weights: Weights, *, statistics: bool = True, fix: str = "", relative: bool = False
) -> dict[str, Any]:
    """Return the metadata of a model file: of this project's as stored, of others as far as their origin is known.

    Args:
        weights: a usable file with an encoder that this project's models compute.
        statistics: they are needed.
        fix: another way to give them, for errors.
        relative: the encoder may be that of a detector.

    Raises:
        UserError: if the file is not usable, or the number of heads or the statistics are not known.
    """
    identity, origin = weights.identity, weights.identity.origin
    if not identity.family:
        raise UserError(f"{weights.where}: contains {identity.title}")
    weights.check_usable()
    weights.check_plain(relative)
    if identity.ours:
        return dict(identity.metadata)
    needs = []
    if origin.num_heads is None:
        needs.append(
            "does not record its number of attention heads, and its sizes do not decide it; put a "
            'config.json with {"num_attention_heads": N} beside it'
        )
    if statistics and origin.statistics is None:
        needs.append(
            f"does not record the mean and std of its input, and its origin is unknown; {fix}put a "
            'preprocessor_config.json with {"image_mean": [...], "image_std": [...]} beside it'
        )
    if needs or origin.num_heads is None:
        raise UserError(f"{weights.where}: {'; it '.join(needs)}")
    if identity.grid is None:
        raise UserError(f"{weights.where}: the rows of its pos_embed do not form a square grid")
    spec = make_spec(FAMILIES[identity.family], {**identity.sizes, "num_heads": origin.num_heads}, "weights file")
    height, width = (side * spec.stride for side in identity.grid)
    metadata: dict[str, Any] = {
        "kind": identity.kind,
        "family": identity.family,
        "spec": asdict(spec),
        "image_size": height if height == width else [height, width],
    }
    if identity.kind == "classifier":
        metadata |= {"num_classes": identity.num_classes, "pool": identity.pool, "class_names": [*origin.class_names]}
    if origin.statistics is not None:
        mean, std = origin.statistics
        metadata |= {"mean": list(mean), "std": list(std)}
    return metadata
