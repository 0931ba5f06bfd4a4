"""Reconstruction of images by a pre-trained model.

Shape legend: B images, S x S pixels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.masking import TokenMask, VisibleSet
from mrmae_ds.models.objectives import PIXELS, patchify, unpatchify
from mrmae_ds.models.pretrain import PretrainModel


class Reconstruction(NamedTuple):
    """Reconstructed images.

    Attributes:
        pasted: [B, 3, S, S], visible patches of the input, and predictions of the removed ones.
        alone: [B, 3, S, S], predictions of all patches.
        standardized: True if the model predicts standardized patches; they got back mean and standard deviation of the
            true patch.
    """

    pasted: Tensor
    alone: Tensor
    standardized: bool


def reconstruct(model: PretrainModel, images: Tensor, visible: VisibleSet | TokenMask) -> Reconstruction | None:
    """Reconstruct normalized images by the first objective that predicts the pixels of all tokens.

    Args:
        model: the pre-trained model.
        images: normalized images [B, 3, S, S].
        visible: the visible set, or the mask.

    Returns:
        Normalized images; None if the model has no such objective.

    Raises:
        UserError: if the normalization of the objective's targets cannot be undone.
    """
    taps = ("encoder", "decoder") if isinstance(visible, TokenMask) else ("decoder",)
    specs = {name: spec for name, spec in model.objectives.items() if spec.target == PIXELS and spec.tap in taps}
    if not specs:
        return None
    name, spec = next(iter(specs.items()))
    predicted = model.predict(images, visible)[name].float()
    true = patchify(images, model.encoder.stride)
    if spec.normalize == "standardize":
        predicted = predicted * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    elif spec.normalize != "none":
        raise UserError(f"objectives.{name}.normalize: {spec.normalize} cannot be undone to show pixels")
    removed = visible.mask[..., None]
    parts = (predicted * removed + true * (1 - removed), predicted)
    pasted, alone = (unpatchify(part, model.encoder.grid, model.encoder.stride) for part in parts)
    return Reconstruction(pasted, alone, spec.normalize == "standardize")
