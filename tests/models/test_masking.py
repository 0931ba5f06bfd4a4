"""Visible sets against plain loops, and the sampling mode against exact probabilities."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mrmae_ds.models.masking import VisibleSet, choose_visible, num_visible


def uniform(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("tokens", "ratio", "keep"),
    [(196, 0.25, 49), (256, 0.25, 64), (64, 0.25, 16), (784, 0.25, 196), (10, 0.25, 2)],
)
def test_number_of_visible_tokens_is_rounded_down(tokens: int, ratio: float, keep: int) -> None:
    assert num_visible(tokens, ratio) == keep


def test_random_keeps_the_smallest_noise() -> None:
    noise = uniform(5, 12)
    visible = choose_visible(noise, (3, 4), 0.34)
    for row in range(5):
        values = noise[row].tolist()
        ordered = sorted(range(12), key=values.__getitem__)
        assert visible.ids_keep[row].tolist() == ordered[:4]
        assert [ordered[place] for place in visible.ids_restore[row].tolist()] == list(range(12))
        assert visible.mask[row].tolist() == [0.0 if token in ordered[:4] else 1.0 for token in range(12)]
    assert visible.mask.dtype == torch.float32


@pytest.mark.parametrize("mode", ["random", "sample", "topk"])
def test_every_mode_gives_a_permutation(mode: str) -> None:
    visible = choose_visible(uniform(4, 16), (4, 4), 0.25, mode, uniform(4, 16, seed=1))
    assert visible.ids_keep.shape == (4, 4)
    assert (visible.ids_restore.sort(1).values == torch.arange(16)).all()
    assert (visible.mask.sum(1) == 12).all()
    for row in range(4):
        for place, token in enumerate(visible.ids_keep[row].tolist()):
            assert visible.ids_restore[row, token] == place


def test_topk_keeps_the_most_important() -> None:
    importance = uniform(4, 16, seed=1)
    visible = choose_visible(uniform(4, 16), (4, 4), 0.25, "topk", importance)
    for row in range(4):
        values = importance[row].tolist()
        assert visible.ids_keep[row].tolist() == sorted(range(16), key=lambda t, v=values: -v[t])[:4]
    again = choose_visible(uniform(4, 16, seed=9), (4, 4), 0.25, "topk", importance)
    assert torch.equal(visible.ids_keep, again.ids_keep)


def exact_inclusion(weights: list[float], keep: int) -> list[float]:
    """Probability that each token is among ``keep`` weighted draws without replacement, by enumeration."""
    inclusion = [0.0] * len(weights)
    for draw in permutations(range(len(weights)), keep):
        probability, rest = 1.0, sum(weights)
        for token in draw:
            probability *= weights[token] / rest
            rest -= weights[token]
        for token in draw:
            inclusion[token] += probability
    return inclusion


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_sample_follows_the_weights(scale: float) -> None:
    weights = [0.4, 0.25, 0.2, 0.1, 0.04, 0.01]
    draws = 40_000
    importance = scale * torch.tensor(weights).expand(draws, 6)
    visible = choose_visible(uniform(draws, 6), (2, 3), 0.5, "sample", importance)
    found = (1 - visible.mask).mean(0).tolist()
    for frequency, probability in zip(found, exact_inclusion(weights, 3), strict=True):
        deviation = (probability * (1 - probability) / draws) ** 0.5
        assert abs(frequency - probability) < 4 * deviation
    first = torch.bincount(visible.ids_keep[:, 0], minlength=6) / draws
    assert first.tolist() == pytest.approx(weights, abs=4 * 0.5 / draws**0.5)


def test_sample_draws_one_token_after_another() -> None:
    """Given the first token drawn, the second follows the weights of the rest."""
    weights = [0.5, 0.3, 0.15, 0.05]
    draws = 60_000
    visible = choose_visible(uniform(draws, 4), (2, 2), 0.5, "sample", torch.tensor(weights).expand(draws, 4))
    for first in range(4):
        second = visible.ids_keep[visible.ids_keep[:, 0] == first, 1]
        frequency = torch.bincount(second, minlength=4) / len(second)
        for token in range(4):
            probability = 0.0 if token == first else weights[token] / (1 - weights[first])
            deviation = (probability * (1 - probability) / len(second)) ** 0.5
            assert abs(frequency[token] - probability) <= 4 * deviation


def test_sample_of_a_whole_grid_equals_numpy() -> None:
    """49 of 196 tokens by an attention map: how often each is visible, against numpy's weighted choice."""
    attention = (1.5 * torch.randn(196, generator=torch.Generator().manual_seed(5))).softmax(0)
    draws = 2000
    visible = choose_visible(uniform(draws, 196), (14, 14), 0.25, "sample", attention.expand(draws, 196))
    ours = (1 - visible.mask).mean(0).numpy()
    generator, weights = np.random.default_rng(6), attention.double().numpy()
    theirs = np.zeros(196)
    for _ in range(draws):
        theirs[generator.choice(196, 49, replace=False, p=weights / weights.sum())] += 1 / draws
    pooled = (ours + theirs) / 2
    deviation = np.sqrt(2 * pooled * (1 - pooled) / draws)
    z = (ours - theirs)[deviation > 0] / deviation[deviation > 0]
    assert abs(z).max() < 4.5
    assert 0.8 < (z**2).mean() < 1.2
    assert ours.sum() == pytest.approx(49, abs=1e-3)


def test_random_masking_keeps_every_token_equally_often() -> None:
    draws = 40_000
    frequency = (1 - choose_visible(uniform(draws, 16), (4, 4), 0.25).mask).mean(0)
    assert (frequency - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / draws) ** 0.5


@pytest.mark.parametrize("smallest", [1e-3, 1e-10, 1e-38])
def test_sample_takes_no_importance_after_any_importance(smallest: float) -> None:
    """Use the least favorable noise for the token with importance, and the most favorable for the others."""
    importance = torch.tensor([[0.0, smallest, 0.0, 0.7]])
    noise = torch.tensor([[1 - 2**-24, 0.0, 0.5, 0.0]])
    visible = choose_visible(noise, (2, 2), 0.5, "sample", importance)
    assert visible.ids_keep.tolist() == [[3, 1]]
    assert visible.ids_restore.tolist() == [[2, 1, 3, 0]]  # among those without, the noise decides


def test_sample_fills_up_with_tokens_without_importance_at_random() -> None:
    importance = torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(8000, 4)
    visible = choose_visible(uniform(8000, 4), (2, 2), 0.5, "sample", importance)
    assert (visible.ids_keep[:, 0] == 2).all()
    assert (torch.bincount(visible.ids_keep[:, 1]) / 8000).tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.03)


def test_sample_takes_tokens_without_importance_last() -> None:
    importance = torch.tensor([0.0, 0.5, 0.0, 1e-6, 0.0, 0.5]).expand(2000, 6)
    visible = choose_visible(uniform(2000, 6), (2, 3), 0.5, "sample", importance)
    assert (visible.ids_keep.sort(1).values == torch.tensor([1, 3, 5])).all()


def test_sample_survives_noise_of_zero() -> None:
    visible = choose_visible(torch.zeros(1, 4), (2, 2), 0.5, "sample", torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    assert visible.ids_keep.tolist() == [[1, 3]]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"noise is \(2, 8\), expected \[B, 9\] for the grid \(3, 3\)"):
        choose_visible(uniform(2, 8), (3, 3), 0.25)
    with pytest.raises(ValueError, match=r"mode 'topk' needs importance of shape \(2, 9\), got None"):
        choose_visible(uniform(2, 9), (3, 3), 0.25, "topk")
    with pytest.raises(ValueError, match=r"mode 'sample' needs importance of shape \(2, 9\), got \(1, 9\)"):
        choose_visible(uniform(2, 9), (3, 3), 0.25, "sample", uniform(1, 9))


@pytest.fixture
def visible() -> VisibleSet:
    return choose_visible(uniform(3, 6), (2, 3), 0.5)


def test_take_gathers_tokens(visible: VisibleSet) -> None:
    tokens = torch.randn(3, 6, 5)
    taken = visible.take(tokens)
    for row in range(3):
        for place, token in enumerate(visible.ids_keep[row].tolist()):
            assert torch.equal(taken[row, place], tokens[row, token])
    shared = visible.take(tokens[:1])
    assert torch.equal(shared[2], tokens[0, visible.ids_keep[2]])
    assert torch.equal(visible.take(tokens[..., 0]), taken[..., 0])


def test_restore_merges_visible_and_removed_tokens(visible: VisibleSet) -> None:
    tokens = torch.randn(3, 6, 5)
    removed = torch.stack([tokens[row, ids] for row, ids in enumerate(visible.ids_removed)])
    assert torch.equal(visible.restore(visible.take(tokens), removed), tokens)
    assert visible.mask.gather(1, visible.ids_removed).all() and visible.ids_removed.shape == (3, 3)
    whole = VisibleSet.whole(3, (2, 3), torch.device("cpu"))
    assert torch.equal(whole.take(tokens), tokens) and not whole.mask.any()


@pytest.mark.parametrize("s", [1, 2, 4])
def test_blocks_of_pixels_match_the_position_of_their_token(visible: VisibleSet, s: int) -> None:
    grid_map, cells = torch.randn(3, 2 * s, 3 * s, 5), visible.cells()
    blocks = cells.take(grid_map)
    assert blocks.shape == (3, 3, s, s, 5)
    laid = cells.put(blocks)
    expected = torch.zeros_like(grid_map)
    for row in range(3):
        for place, token in enumerate(visible.ids_keep[row].tolist()):
            top, left = token // 3 * s, token % 3 * s
            block = grid_map[row, top : top + s, left : left + s]
            assert torch.equal(blocks[row, place], block)
            expected[row, top : top + s, left : left + s] = block
    assert torch.equal(laid, expected)
    assert torch.equal(cells.take(laid), blocks)


def test_gradients_of_blocks_stay_with_the_visible(visible: VisibleSet) -> None:
    grid_map, cells = torch.randn(3, 4, 6, 5, requires_grad=True), visible.cells()
    cells.put(cells.take(grid_map)).sum().backward()
    removed = visible.mask.reshape(3, 2, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(grid_map.grad[..., 0], 1 - removed)


def test_gradients_of_blocks_of_both_orders(visible: VisibleSet) -> None:
    cells = visible.cells()
    grid_map, blocks = torch.randn(3, 4, 6, 2), torch.randn(3, 3, 2, 2, 2)
    for function, value in ((cells.take, grid_map), (cells.put, blocks)):
        inputs = (value.double().requires_grad_(),)
        assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


class Launches(TorchDispatchMode):
    """Names of the operations that compute or copy, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_map_is_neither_rearranged_nor_added_up(visible: VisibleSet) -> None:
    """Between the layouts of the block and of the convolution there is one copy each way, and zeros for the rest."""
    cells, blocks = visible.cells(), torch.randn(3, 3, 2, 2, 5, requires_grad=True)
    with Launches() as forward:
        result = cells.take(cells.put(blocks).permute(0, 3, 1, 2).permute(0, 2, 3, 1))
    grad = torch.ones_like(result)
    with Launches() as backward:
        result.backward(grad)
    assert forward.names == ["new_zeros", "index_put_", "index"]
    assert [name for name in backward.names if name != "detach"] == forward.names
