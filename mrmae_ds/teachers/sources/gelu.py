"""Which GELU a file of CLIP weights was trained with: OpenAI's approximation x * sigmoid(1.702 x), or the true one.

The two give other features from the same weights, no shape differs, and nothing fails. So it is never taken from a
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

# What OpenAI's archives and the state dicts taken from them hold beside the weights.
OPENAI_SCALARS = {"input_resolution", "context_length", "vocab_size"}
OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Gelu:
    """``quick``: QuickGELU. ``why``: by what evidence, in words."""

    quick: bool
    why: str

    def __str__(self) -> str:
        return f"{'QuickGELU' if self.quick else 'GELU'}, by {self.why}"


def gelu_of_file(file: TensorFile) -> Gelu | None:
    """What a file of weights, or the configuration beside it, says; None if they say nothing.

    Raises:
        UserError: if they contradict each other.
    """
    found = [evidence for evidence in (_of_archive(file), _of_scalars(file), _of_config(file.path)) if evidence]
    if len({evidence.quick for evidence in found}) > 1:
        listed = "; ".join(map(str, found))
        raise UserError(f"{file.path}: contradictory about its GELU ({listed}); move the file that does not belong")
    return found[0] if found else None


def _of_archive(file: TensorFile) -> Gelu | None:
    if file.format != "torchscript":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: TorchScript is deprecated
        archive = torch.jit.load(str(file.path), map_location="cpu")
    # A traced module keeps its constants beside its code; the graph shows both.
    graph = str(getattr(archive, "visual", archive).inlined_graph)
    if "1.702" in graph:
        return Gelu(True, "the archive's code")
    return Gelu(False, "the archive's code") if "gelu" in graph else None


def _of_scalars(file: TensorFile) -> Gelu | None:
    return Gelu(True, "OpenAI's scalars in the file") if file.tensors.keys() >= OPENAI_SCALARS else None


def _of_config(path: Path) -> Gelu | None:
    config = path.parent / OPEN_CLIP_CONFIG
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        model = content.get("model_cfg", content)
        if "timm_model_name" in model["vision_cfg"]:
            return None  # such a tower's GELU is timm's affair
        return Gelu(bool(model.get("quick_gelu", False)), f"{OPEN_CLIP_CONFIG} beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: not an open_clip configuration ({type(error).__name__}: {error})") from None
