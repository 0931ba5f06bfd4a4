"""Determine the GELU of CLIP weights: OpenAI's approximation x * sigmoid(1.702 x), or the exact one.

With the wrong GELU the features differ, although no shape does and nothing fails. Therefore it is never inferred from a
model's name alone.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

import torch

from mrmae_ds.errors import UserError
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.weights.beside import CONFIG, OPEN_CLIP, config_part, describes_tower, read_config
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.names import HF_CLIP
from mrmae_ds.weights.origin import OPENAI_SCALARS


@dataclass(frozen=True)
class Gelu:
    """A GELU and the evidence for it.

    Attributes:
        quick: True for QuickGELU, False for the exact GELU.
        why: the evidence, in words.
    """

    quick: bool
    why: str

    def __str__(self) -> str:
        return f"{'QuickGELU' if self.quick else 'GELU'}, by {self.why}"


def gelu_of_file(file: TensorFile) -> Gelu | None:
    """Return the GELU recorded in a weights file or in the configuration beside it; None if neither records one.

    Raises:
        UserError: if they contradict each other.
    """
    found = (_from_archive(file), _from_scalars(file), _from_config(file), _from_hugging_face(file))
    evidence = [gelu for gelu in found if gelu]
    if len({gelu.quick for gelu in evidence}) > 1:
        listed = "; ".join(map(str, evidence))
        raise UserError(
            f"{file.path}: contradictory evidence for its GELU ({listed}); remove the file that does not belong to it"
        )
    return evidence[0] if evidence else None


def resolve_gelu(evidence: Gelu | None, options: TeacherOptions, fix: str) -> Gelu:
    """Return the GELU by evidence, or by the recipe if there is no evidence.

    Args:
        evidence: GELU of the weights by their origin, if it is known.
        options: options from the recipe.
        fix: the alternative to the recipe's key, in words.

    Raises:
        UserError: naming the key, if the GELU is undetermined or the recipe contradicts the evidence.
    """
    given = options.quickgelu
    if evidence is None:
        if given is None:
            raise UserError(
                f"{options.key}.quickgelu: {options.weights} does not record the GELU that it was trained with, and "
                "the wrong one silently changes the features; set true (OpenAI's weights and those tuned from them) or "
                f"false, or {fix}"
            )
        return Gelu(given, "the recipe")
    if given is not None and given != evidence.quick:
        raise UserError(
            f"{options.key}.quickgelu: {str(given).lower()} in the recipe, but the weights are of {evidence}; remove "
            "the key"
        )
    return evidence


def _from_archive(file: TensorFile) -> Gelu | None:
    if file.format != "torchscript":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's deprecation of TorchScript
        archive = torch.jit.load(str(file.path), map_location="cpu")
    # A traced module stores constants separately from its code; the graph contains both.
    graph = str(getattr(archive, "visual", archive).inlined_graph)
    if "1.702" in graph:
        return Gelu(True, "the archive's code")
    return Gelu(False, "the archive's code") if "gelu" in graph else None


def _from_scalars(file: TensorFile) -> Gelu | None:
    return Gelu(True, "OpenAI's scalars in the file") if file.tensors.keys() >= OPENAI_SCALARS else None


def _from_hugging_face(file: TensorFile) -> Gelu | None:
    """Read ``hidden_act`` of the configuration that transformers writes beside a CLIP."""
    if file.layout != HF_CLIP:
        return None
    config = read_config(file, CONFIG)
    act = (config_part(config, "vision_config") or config).get("hidden_act")
    return Gelu(act == "quick_gelu", "config.json beside it") if act in ("quick_gelu", "gelu") else None


def _from_config(file: TensorFile) -> Gelu | None:
    config = file.path.parent / OPEN_CLIP
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8-sig"))
        model = content.get("model_cfg", content)
        vision = model["vision_cfg"]
        if "timm_model_name" in vision or not describes_tower(vision, file.tensors):
            return None  # timm defines the GELU of such a tower, or it is another file's
        return Gelu(bool(model.get("quick_gelu", False)), f"{OPEN_CLIP} beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: not an open_clip configuration ({type(error).__name__}: {error})") from None
