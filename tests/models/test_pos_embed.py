"""Sin-cos positions and their resizing, against the authors' numbers."""

from __future__ import annotations

import math
import re

import pytest
import torch

from mrmae_ds.models.pos_embed import resize_pos_embed, sincos_pos_embed
from tests.fixtures import load_json

REFERENCE = load_json("positions")


@pytest.mark.parametrize("name", list(REFERENCE["sincos"]))
def test_sincos_equals_maes(name: str) -> None:
    dim, side, prefix = (int(number) for number in re.findall(r"\d+", name))
    expected = REFERENCE["sincos"][name]
    positions = sincos_pos_embed(dim, (side, side), prefix)
    assert positions.dtype == torch.float32
    assert list(positions.shape) == [1, *expected["shape"]]
    assert positions.double().sum().item() == pytest.approx(expected["sum"], abs=1e-6 * positions.numel())
    assert positions.double().abs().sum().item() == pytest.approx(expected["abs_sum"], abs=1e-6 * positions.numel())
    for row, column, value in expected["samples_row_col_value"]:
        assert positions[0, int(row), int(column)].item() == pytest.approx(value, abs=1e-6)


def test_columns_come_first_on_a_grid_that_is_not_square() -> None:
    positions = sincos_pos_embed(8, (2, 3))
    for row in range(2):
        for column in range(3):
            expected = []
            for place in (column, row):
                angles = [place * 10000 ** (-i / 2) for i in range(2)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            assert positions[0, row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_pos_embed(6, (2, 2))


@pytest.mark.parametrize("name", list(REFERENCE["resized"]))
def test_resized_equals_the_authors(name: str) -> None:
    dim, old, new = (int(number) for number in re.findall(r"\d+", name))
    expected = REFERENCE["resized"][name]
    resized = resize_pos_embed(sincos_pos_embed(dim, (old, old)), (old, old), (new, new))
    assert list(resized.shape) == expected["shape"]
    assert resized.double().sum().item() == pytest.approx(expected["sum"], abs=1e-6 * resized.numel())
    assert resized.double().abs().sum().item() == pytest.approx(expected["abs_sum"], abs=1e-6 * resized.numel())
    assert resized[0, 0, :4].tolist() == pytest.approx(expected["first4"], abs=1e-5)
    assert resized[0, 37, :4].tolist() == pytest.approx(expected["row37_first4"], abs=1e-5)


def test_same_grid_is_left_alone() -> None:
    positions = sincos_pos_embed(16, (3, 3))
    assert resize_pos_embed(positions, (3, 3), (3, 3)) is positions


def test_resizing_keeps_rows_and_columns_apart() -> None:
    grid_map = torch.arange(4.0)[:, None, None].expand(4, 4, 2).clone()  # grows downwards, constant along a row
    grid_map[..., 1] = torch.arange(4.0)  # grows to the right, constant down a column
    resized = resize_pos_embed(grid_map.reshape(1, 16, 2), (4, 4), (8, 2)).reshape(8, 2, 2)
    assert torch.allclose(resized[:, 0, 0], resized[:, 1, 0], atol=1e-5)
    assert torch.allclose(resized[:, :, 1], resized[:1, :, 1].expand(8, 2), atol=1e-5)
    assert (resized[1:, 0, 0] > resized[:-1, 0, 0]).all()


def test_prefix_tokens_keep_their_positions() -> None:
    positions = torch.randn(1, 2 + 4, 8)
    resized = resize_pos_embed(positions, (2, 2), (3, 5), prefix_tokens=2)
    assert torch.equal(resized[:, :2], positions[:, :2])
    assert torch.equal(resized[:, 2:], resize_pos_embed(positions[:, 2:], (2, 2), (3, 5)))


def test_resizing_keeps_the_precision_of_its_input() -> None:
    assert resize_pos_embed(torch.randn(1, 4, 8).bfloat16(), (2, 2), (4, 4)).dtype == torch.bfloat16
