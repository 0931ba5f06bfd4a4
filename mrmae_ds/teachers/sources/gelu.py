"""Determine the GELU of CLIP weights: OpenAI's approximation x * sigmoid(1.702 x), or the exact one.

With the wrong GELU the features differ, although no shape does and nothing fails. Therefore it is never inferred from a
model's name alone.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from mrmae_ds.errors import UserError
from mrmae_ds.weights.formats import TensorFile

# Entries of OpenAI's archives, and of state dicts taken from them, besides the weights.
OPENAI_SCALARS = {"input_resolution", "context_length", "vocab_size"}
OPEN_CLIP_CONFIG = "open_clip_config.json"


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
    evidence = [gelu for gelu in (_from_archive(file), _from_scalars(file), _from_config(file.path)) if gelu]
    if len({gelu.quick for gelu in evidence}) > 1:
        listed = "; ".join(map(str, evidence))
        raise UserError(
            f"{file.path}: contradictory evidence for its GELU ({listed}); remove the file that does not belong to it"
        )
    return evidence[0] if evidence else None


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


def _from_config(path: Path) -> Gelu | None:
    config = path.parent / OPEN_CLIP_CONFIG
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        model = content.get("model_cfg", content)
        if "timm_model_name" in model["vision_cfg"]:
            return None  # timm defines the GELU of such a tower
        return Gelu(bool(model.get("quick_gelu", False)), f"{OPEN_CLIP_CONFIG} beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: not an open_clip configuration ({type(error).__name__}: {error})") from None
