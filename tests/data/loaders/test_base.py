"""Evaluation of a part of a data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrmae_ds.config.sections import Backend
from mrmae_ds.errors import UserError
from tests.support.loaders import open_loader
from tests.support.sample_data import write_sample_beton


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_beton(tmp_path_factory.mktemp("samples"), train=64, val=50)[1]


def _read(beton: Path, samples: int | None, world_size: int = 1, backend: Backend = "pillow") -> list[list[int]]:
    """Return the valid rows of each rank."""
    ranks = []
    for rank in range(world_size):
        loader = open_loader(beton, backend, image_size=16, world_size=world_size, rank=rank, samples=samples)
        assert loader.num_samples == min(samples or 50, 50)
        batches = list(loader.epoch(0))
        assert len(batches) == loader.batches_per_epoch
        ranks.append([int(i) for batch in batches for i in batch.indices[batch.valid]])
        loader.close()
    return ranks


@pytest.mark.parametrize("backend", ["pillow", pytest.param("ffcv", marks=pytest.mark.ffcv)])
def test_evaluated_part_is_evenly_spaced(beton: Path, backend: Backend) -> None:
    assert _read(beton, 7, backend=backend) == [[0, 7, 14, 21, 28, 35, 42]]


@pytest.mark.parametrize("samples", [None, 50, 1000])
def test_part_is_limited_to_the_data_set(beton: Path, samples: int | None) -> None:
    assert _read(beton, samples) == [list(range(50))]


def test_part_does_not_depend_on_ranks(beton: Path) -> None:
    (alone,) = _read(beton, 21)
    assert len(set(alone)) == 21 and alone[-1] == 50 * 20 // 21
    for world_size in (2, 3):
        assert sorted(row for rank in _read(beton, 21, world_size) for row in rank) == alone


def test_empty_part_is_an_error(beton: Path) -> None:
    with pytest.raises(UserError, match="samples must be at least 1, not 0"):
        _read(beton, 0)
