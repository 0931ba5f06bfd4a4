"""Losses and targets against float64 formulas written as plain loops."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mrmae_ds.models.masking import VisibleSet, choose_visible
from mrmae_ds.models.objectives import (
    Objective,
    normalize_target,
    objective_loss,
    patchify,
    token_loss,
    total_loss,
    unpatchify,
)

B, ROWS, COLUMNS, D = 2, 2, 3, 5
L = ROWS * COLUMNS
LOSSES = ["l2", "l2_sum", "l1", "smooth_l1", "cosine"]
NORMALIZATIONS = ["standardize", "layer_norm", "l2", "none"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def visible() -> VisibleSet:
    noise = torch.rand(B, L, generator=torch.Generator().manual_seed(3))
    return choose_visible(noise, (ROWS, COLUMNS), 0.34)


def normalized(values: list[float], how: str) -> list[float]:
    mean = sum(values) / len(values)
    squares = sum((v - mean) ** 2 for v in values)
    if how == "standardize":
        return [(v - mean) / math.sqrt(squares / (len(values) - 1) + 1e-6) for v in values]
    if how == "layer_norm":
        return [(v - mean) / math.sqrt(squares / len(values) + 1e-5) for v in values]
    if how == "l2":
        return [v / math.sqrt(sum(w * w for w in values)) for v in values]
    return values


def distance(p: list[float], t: list[float], loss: str) -> float:
    gaps = [abs(a - b) for a, b in zip(p, t, strict=True)]
    if loss == "cosine":
        dot = sum(a * b for a, b in zip(p, t, strict=True))
        return 1 - dot / math.sqrt(sum(a * a for a in p) * sum(b * b for b in t))
    if loss == "smooth_l1":
        return sum(g * g / 2 if g < 1 else g - 0.5 for g in gaps) / len(gaps)
    if loss == "l1":
        return sum(gaps) / len(gaps)
    return sum(g * g for g in gaps) / (1 if loss == "l2_sum" else len(gaps))


CASES = [("encoder", "visible"), ("decoder", "visible"), ("decoder", "masked"), ("decoder", "all")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("tap", "tokens"), CASES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_objective_loss_is_the_formula(
    loss: str, normalize: str, tap: str, tokens: str, dtype: torch.dtype, tolerance: float, visible: VisibleSet
) -> None:
    spec = Objective(target="t", tap=tap, tokens=tokens, loss=loss, normalize=normalize, weight=1)
    target = normal(B, L, D).to(dtype)
    prediction = normal(B, visible.ids_keep.shape[1] if tap == "encoder" else L, D, seed=1).to(dtype)
    total, count = 0.0, 0
    for row, token in product(range(B), range(L)):
        kept = visible.ids_keep[row].tolist()
        if tokens != "all" and (token in kept) != (tokens == "visible"):
            continue
        place = kept.index(token) if tap == "encoder" else token
        truth = normalized(target[row, token].tolist(), normalize)
        total += distance(prediction[row, place].tolist(), truth, loss)
        count += 1
    found = objective_loss(spec, prediction, target, visible)
    assert found.dtype == dtype
    assert found.item() == pytest.approx(total / count, rel=tolerance)


@pytest.mark.parametrize(("tap", "tokens"), CASES)
@pytest.mark.parametrize("normalize_prediction", ["none", "l2"])
def test_the_class_token_is_one_more_token(
    normalize_prediction: str, tap: str, tokens: str, visible: VisibleSet
) -> None:
    settings = {"target": "t", "tap": tap, "tokens": tokens, "loss": "l1", "normalize": "l2", "weight": 1}
    spec = Objective(**settings, class_token=True, normalize_prediction=normalize_prediction)
    target, num_tokens = normal(B, 1 + L, D), visible.ids_keep.shape[1] if tap == "encoder" else L
    prediction = normal(B, 1 + num_tokens, D, seed=1)
    distances = []
    for row in range(B):
        kept = visible.ids_keep[row].tolist()
        chosen = [t for t in range(L) if tokens == "all" or (t in kept) == (tokens == "visible")]
        places = [kept.index(t) if tap == "encoder" else t for t in chosen]
        for place, token in [(-1, -1), *zip(places, chosen, strict=True)]:
            p = normalized(prediction[row, 1 + place].tolist(), normalize_prediction)
            distances.append(distance(p, normalized(target[row, 1 + token].tolist(), "l2"), "l1"))
    found = objective_loss(spec, prediction, target, visible)
    assert found.item() == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    without = Objective(**settings)
    patches = objective_loss(without, prediction[:, 1:], target, visible)
    assert torch.equal(patches, objective_loss(without, prediction[:, 1:], target[:, 1:], visible))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_smooth_l1_turns_linear_at_beta(beta: float, visible: VisibleSet) -> None:
    settings = {"target": "t", "tap": "decoder", "tokens": "all", "normalize": "none", "weight": 1}
    spec = Objective(**settings, loss="smooth_l1", beta=beta)
    prediction, target = normal(B, L, D, seed=1), normal(B, L, D)
    gaps = (prediction - target).abs().double()
    expected = torch.where(gaps < beta, gaps**2 / (2 * beta), gaps - beta / 2).mean()
    assert objective_loss(spec, prediction, target, visible).item() == pytest.approx(expected.item(), rel=1e-5)
    if beta == 1:
        default = Objective(**settings, loss="smooth_l1")
        assert torch.equal(*(objective_loss(s, prediction, target, visible) for s in (spec, default)))


def test_beta_is_recorded_only_if_given_and_only_of_smooth_l1() -> None:
    settings = {"target": "t", "tap": "decoder", "tokens": "all", "normalize": "none", "weight": 1}
    assert "beta" not in Objective(**settings, loss="smooth_l1").model_dump(mode="json")  # as in runs before it existed
    assert Objective(**settings, loss="smooth_l1", beta=2).model_dump(mode="json")["beta"] == 2
    with pytest.raises(ValidationError, match="beta: has no effect on loss: l2"):
        Objective(**settings, beta=2)
    with pytest.raises(ValidationError, match="greater than 0"):
        Objective(**settings, loss="smooth_l1", beta=0)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_constant_target_is_no_division_by_zero(normalize: str, visible: VisibleSet) -> None:
    """A patch of one color has no variance, a dead teacher token no length."""
    target = torch.zeros(B, L, D) if normalize == "l2" else torch.full((B, L, D), 2.5)
    expected = 2.5 if normalize == "none" else 0.0
    torch.testing.assert_close(normalize_target(target, normalize), torch.full((B, L, D), expected), atol=1e-3, rtol=0)
    for loss in LOSSES:
        spec = Objective(target="t", tap="decoder", tokens="all", loss=loss, normalize=normalize, weight=1)
        prediction = normal(B, L, D, seed=1).requires_grad_()
        objective_loss(spec, prediction, target, visible).backward()
        assert prediction.grad.isfinite().all()


def test_losses_are_computed_in_float32(visible: VisibleSet) -> None:
    prediction, target = normal(B, L, D, seed=1).bfloat16(), normal(B, L, D).bfloat16()
    for loss in LOSSES:
        assert token_loss(prediction, target, loss).dtype == torch.float32
        assert torch.equal(token_loss(prediction, target, loss), token_loss(prediction.float(), target.float(), loss))
    for how in NORMALIZATIONS:
        assert normalize_target(target, how).dtype == torch.float32


def test_shapes_that_differ_are_refused(visible: VisibleSet) -> None:
    spec = Objective(target="t", tap="decoder", tokens="all", normalize="none", weight=1)
    with pytest.raises(ValueError, match=r"prediction \(2, 6, 4\) and target \(2, 6, 5\) differ"):
        objective_loss(spec, normal(B, L, 4), normal(B, L, 5), visible)


@pytest.mark.parametrize("tokens", ["masked", "all"])
def test_removed_tokens_at_the_encoder_are_refused(tokens: str, visible: VisibleSet) -> None:
    spec = Objective(target="t", tap="encoder", tokens=tokens, normalize="none", weight=1)
    with pytest.raises(ValueError, match=f"visible tokens only, so tokens: {tokens} cannot be supervised"):
        objective_loss(spec, normal(B, L, 4), normal(B, L, 4), visible)


@pytest.mark.parametrize("change", [{"weight": 0}, {"loss": "l3"}, {"wieght": 1}, {"normalize": "mean"}])
def test_wrong_values_and_unknown_keys_are_refused(change: dict[str, object]) -> None:
    values = {"target": "t", "tap": "decoder", "tokens": "all", "normalize": "none", "weight": 1}
    with pytest.raises(ValidationError):
        Objective.model_validate(values | change)


def test_numbers_may_be_strings_and_sections_are_immutable() -> None:
    spec = Objective(target="t", tap="decoder", tokens="all", normalize="none", weight="1e-3")
    assert spec.weight == 0.001
    assert spec.loss == "l2"
    with pytest.raises(ValidationError):
        spec.weight = 2.0


def test_total_is_the_weighted_sum() -> None:
    def spec(weight: float) -> Objective:
        return Objective(target="t", tap="decoder", tokens="all", normalize="none", weight=weight)

    losses = {"a": torch.tensor(3.0), "b": torch.tensor(5.0), "c": torch.tensor(0.25)}
    total = total_loss({"a": spec(0.5), "b": spec(0.25), "c": spec(2)}, losses)
    assert total.shape == ()
    assert total.item() == pytest.approx(0.5 * 3 + 0.25 * 5 + 2 * 0.25)


def test_patchify_orders_row_column_channel() -> None:
    images, p = normal(B, 3, 4, 6), 2
    tokens = patchify(images, p)
    assert tokens.shape == (B, 6, 12)
    for row, t, y, x, channel in product(range(B), range(6), range(p), range(p), range(3)):
        pixel = images[row, channel, t // 3 * p + y, t % 3 * p + x]
        assert tokens[row, t, (y * p + x) * 3 + channel] == pixel
    assert torch.equal(unpatchify(tokens, (2, 3), p), images)
