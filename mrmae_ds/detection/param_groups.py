"""Learning-rate scale and weight decay of a detector's parameters, by their names: the rules of the authors' code.

They are Detectron2's, whose norms without decay are ``torch.nn.LayerNorm``s alone: biases, relative positions and the
norms over channels of pyramid and heads are decayed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

ENCODER, POSITIONS = "backbone.net.", "backbone.net.pos_embed"
BLOCK = re.compile(r"backbone\.net\.blocks3?\.(\d+)\.")  # of a plain ViT or of a CViT's transformer stage
NORM = re.compile(r"backbone\.net\.(?:.+\.)?norm\d?\.(?:weight|bias)")


class ParameterRule(NamedTuple):
    """Treatment of a parameter.

    Attributes:
        scale: factor of the learning rate.
        decays: True if it has weight decay.
    """

    scale: float
    decays: bool


def detectron2_rules(names: Iterable[str], layer_decay: float) -> dict[str, ParameterRule]:
    """Return the rules of the parameters of a detector.

    Layer 0 is everything of the encoder before its transformer blocks, which follow; pyramid and heads are the last.
    The position embedding belongs to the last layer in the authors' CViT and to layer 0 in Detectron2's plain ViT.

    Args:
        names: of all parameters.
        layer_decay: factor of the rate from one layer to the one below it.
    """
    names = list(names)
    blocks = [int(match[1]) for match in map(BLOCK.match, names) if match]
    last, plain = max(blocks) + 2, f"{ENCODER}patch_embed.proj.weight" in names

    def layer(name: str) -> int:
        if match := BLOCK.match(name):
            return int(match[1]) + 1
        return 0 if name.startswith(ENCODER) and (plain or name != POSITIONS) else last

    return {
        name: ParameterRule(layer_decay ** (last - layer(name)), name != POSITIONS and not NORM.fullmatch(name))
        for name in names
    }
