"""Data sets that are written once for all tests of the data room."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrmae_ds.data.options import WriteOptions
from mrmae_ds.data.writer import write_beton

from .samples import Photographs, write_sample_beton


@pytest.fixture(scope="session")
def betons(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train, val): 150 and 37 real 32x32 pictures in ten classes."""
    return write_sample_beton(tmp_path_factory.mktemp("betons"), train=150, val=37)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 photographs of many sizes and shapes, longer side at most 256."""
    path = tmp_path_factory.mktemp("photographs") / "train.beton"
    write_beton(
        Photographs(),
        path,
        WriteOptions(max_side=256, quality=95, workers=2),
        class_names=["wide", "tall"],
        name="photographs",
        source="a photograph",
    )
    return path
