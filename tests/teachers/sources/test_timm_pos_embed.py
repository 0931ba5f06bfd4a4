"""DINO's resize of pos_embed against the bicubic formula in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from mrmae_ds.teachers.sources.timm import resize_pos_embed_dino


def weight(distance: float) -> float:
    """Keys' cubic convolution kernel with a = -0.75, torch's and OpenCV's."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize(("old", "new"), [(5, 3), (4, 7), (6, 6)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_equals_the_bicubic_formula_with_the_authors_scale(old: int, new: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(old)
    pos_embed = torch.randn(1, prefix + old * old, 2, generator=generator)
    resized = resize_pos_embed_dino(pos_embed, prefix, (new, new))
    assert torch.equal(resized[:, :prefix], pos_embed[:, :prefix])
    if old == new:
        assert torch.equal(resized, pos_embed)
        return
    scale = (new + 0.1) / old

    def taps(index: int) -> list[tuple[int, float]]:
        source = (index + 0.5) / scale - 0.5
        first = math.floor(source)
        return [(min(max(first + k, 0), old - 1), weight(source - first - k)) for k in (-1, 0, 1, 2)]

    for row in range(new):
        for column in range(new):
            for channel in range(2):
                expected = sum(
                    wy * wx * pos_embed[0, prefix + y * old + x, channel].item()
                    for y, wy in taps(row)
                    for x, wx in taps(column)
                )
                assert resized[0, prefix + row * new + column, channel].item() == pytest.approx(expected, abs=1e-4)


def test_refuses_a_grid_that_is_not_square() -> None:
    with pytest.raises(ValueError, match="7 position embeddings do not form a square grid"):
        resize_pos_embed_dino(torch.zeros(1, 8, 2), 1, (3, 3))
