"""Pre-training objectives: target, tap, tokens and distance of each loss.

MAE, MCMAE, MR-MAE and the paper's ablations are sets of objectives, not branches in the code.

Shape legend: B images, L tokens of the grid, K visible tokens, D width of a target, p pixels of a token's side.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from mrmae_ds.models.masking import TokenMask, VisibleSet
from mrmae_ds.schema import Section

PIXELS, HOG = "pixels", "hog"
COMPUTED = {PIXELS, HOG}  # targets that are computed from the images, without a teacher


class Objective(Section):
    """One loss of pre-training.

    Attributes:
        target: ``pixels`` (of the student's normalized input), ``hog`` (histograms of oriented gradients of the image
            before that, MaskFeat) or the name of one of the stage's teachers; NAME.LAYER of a teacher with several
            ``layers``.
        tap: source of the prediction: the fused ``encoder`` latent, or the ``decoder``'s output.
        block: at the encoder, the transformer block (0-based) whose output is tapped instead of the latent.
        mix: tap a weighted sum of all blocks' outputs instead; its learned weights start near ``block`` alone
            (MaskAlign).
        tokens: tokens that the loss is averaged over. Of an encoder that computes the visible ones alone, these.
        class_token: the class token is one more of these tokens.
        loss: per-token distance: ``l2`` mean squared error over channels, ``l2_sum`` its sum over channels
            (Eq. 2 of the MR-MAE paper, literally), ``l1`` mean absolute error, ``smooth_l1``, or ``cosine`` (1 - cosine
            similarity).
        beta: of ``smooth_l1``: difference from which it is linear instead of quadratic; null is 1 (data2vec: 2).
        normalize: per-token normalization of the target: ``standardize`` by mean and unbiased variance + 1e-6 (MAE's
            norm_pix), ``layer_norm`` without affine, ``l2`` to unit length, or ``none``.
        normalize_prediction: ``l2`` scales each token's prediction to unit length too (DMAE).
        weight: factor in the total.
    """

    target: str
    tap: Literal["encoder", "decoder"]
    # Keys with exclude_if are left out of records and hashes at their defaults, so that runs from before they existed
    # keep their hash.
    block: int | None = Field(None, ge=0, exclude_if=lambda value: value is None)
    mix: bool = Field(False, exclude_if=lambda value: not value)
    tokens: Literal["visible", "masked", "all"]
    class_token: bool = Field(False, exclude_if=lambda value: not value)
    loss: Literal["l2", "l2_sum", "l1", "smooth_l1", "cosine"] = "l2"
    beta: float | None = Field(None, gt=0, allow_inf_nan=False, exclude_if=lambda value: value is None)
    normalize: Literal["standardize", "layer_norm", "l2", "none"]
    normalize_prediction: Literal["none", "l2"] = Field("none", exclude_if=lambda value: value == "none")
    weight: float = Field(gt=0)

    @model_validator(mode="after")
    def _beta_has_an_effect(self) -> Objective:
        if self.beta is not None and self.loss != "smooth_l1":
            raise ValueError(f"beta: has no effect on loss: {self.loss} (only on smooth_l1); remove it")
        return self

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Objective:
        if self.block is not None and self.tap != "encoder":
            raise ValueError(f"block: has no effect on tap: {self.tap} (only on encoder); remove it")
        if self.mix and self.block is None:
            raise ValueError("mix: name the block that its weights start at as block")
        if self.class_token and self.target in COMPUTED:
            raise ValueError(f"class_token: the target {self.target} has no class token; remove it")
        if self.normalize_prediction != "none" and self.loss == "cosine":
            raise ValueError("normalize_prediction: has no effect on loss: cosine; remove it")
        return self


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into the pixels of each token, as MAE does.

    Args:
        images: [B, 3, H, W].
        patch: side p of a token in pixels.

    Returns:
        Pixels [B, L, p*p*3], ordered row, column, channel (channel fastest).
    """
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Invert :func:`patchify`.

    Args:
        tokens: pixels of each token, [B, L, p*p*3].
        grid: rows and columns of the token grid.
        patch: side p of a token in pixels.

    Returns:
        Images [B, 3, rows*p, columns*p].
    """
    rows, columns = grid
    x = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], 3, rows * patch, columns * patch)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are returned unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize_target(target: Tensor, how: str) -> Tensor:
    """Normalize the target of each token.

    Args:
        target: [..., D].
        how: one of :attr:`Objective.normalize`.

    Returns:
        Normalized target [..., D]: float32, or float64 if ``target`` is.
    """
    target = at_least_float32(target)
    if how == "standardize":
        return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    if how == "layer_norm":
        return F.layer_norm(target, target.shape[-1:])
    if how == "l2":
        return F.normalize(target, dim=-1)
    return target


def token_loss(prediction: Tensor, target: Tensor, loss: str, beta: float = 1.0) -> Tensor:
    """Compute the distance of prediction and target for each token.

    Args:
        prediction: [..., D].
        target: [..., D].
        loss: one of :attr:`Objective.loss`.
        beta: of ``smooth_l1``.

    Returns:
        Distance [...]: float32, or float64 if an input is.
    """
    prediction, target = at_least_float32(prediction), at_least_float32(target)
    if loss == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1)
    if loss == "l1":
        return (prediction - target).abs().mean(-1)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(-1)
    squared = (prediction - target).square()
    return squared.sum(-1) if loss == "l2_sum" else squared.mean(-1)


def objective_loss(spec: Objective, prediction: Tensor, target: Tensor, visible: VisibleSet | TokenMask) -> Tensor:
    """Compute the mean of one objective over its tokens.

    Args:
        spec: the objective.
        prediction: [B, K, D] at an encoder of a visible set, else [B, L, D], the class token first if the objective
            has it.
        target: target before normalization, [B, P + L, D] with P class tokens (none, or one).
        visible: visible set of the batch, or mask.

    Returns:
        Scalar: float32, or float64 if an input is.

    Raises:
        ValueError: if prediction and target differ in shape, or the encoder does not compute the objective's tokens.
    """
    only_visible = spec.tap == "encoder" and isinstance(visible, VisibleSet)
    if only_visible and spec.tokens != "visible":
        raise ValueError(f"tap: encoder has visible tokens only, so tokens: {spec.tokens} cannot be supervised")
    target = normalize_target(target, spec.normalize)
    prefix = target.shape[1] - visible.grid[0] * visible.grid[1]
    classes, target = target[:, :prefix], target[:, prefix:]
    if spec.tap == "encoder":
        target = visible.take(target)
    if spec.class_token:
        target = torch.cat([classes, target], dim=1)
    if spec.normalize_prediction == "l2":
        prediction = F.normalize(at_least_float32(prediction), dim=-1)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ")
    per_token = token_loss(prediction, target, spec.loss, 1.0 if spec.beta is None else spec.beta)
    if spec.tokens == "all" or only_visible:
        return per_token.mean()
    removed = visible.mask
    chosen = removed if spec.tokens == "masked" else 1 - removed
    if spec.class_token:
        chosen = torch.cat([torch.ones_like(chosen[:, :prefix]), chosen], dim=1)
    return (per_token * chosen).sum() / chosen.sum()


def total_loss(specs: dict[str, Objective], losses: dict[str, Tensor]) -> Tensor:
    """Return the weighted sum of the losses, a scalar.

    Args:
        specs: objectives by name, with their weights.
        losses: scalar loss of each objective, by the same names.
    """
    return torch.stack([spec.weight * losses[name] for name, spec in specs.items()]).sum()
