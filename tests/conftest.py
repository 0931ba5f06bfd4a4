"""Fixtures shared by all tests: sample data sets, the authors' reference values, a process group of one rank."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.writer import write_beton
from tests.fixtures import load_reference
from tests.support.fake_gpu.preload import missing_requirement
from tests.support.sample_data import Photographs, write_sample_beton


def pytest_configure() -> None:
    """Let SIGHUP act under ``nohup``, too: some tests close the terminal of processes that they start."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with multi-process tests first, and skip tests whose requirements are missing, with the reason.

    The requirements are those of the markers `gpu`, `multi_gpu`, `ffcv` and `fake_gpu`.
    """
    long = {item.path for item in items if item.get_closest_marker("multi_process")}
    items.sort(key=lambda item: item.path not in long)
    devices = torch.cuda.device_count()
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    missing = {
        "gpu": None if devices >= 1 else "needs a CUDA device",
        "multi_gpu": None if devices >= 2 else f"needs two CUDA devices, found {devices}",
        "ffcv": None if has_ffcv else "needs FFCV: pip install -e '.[ffcv]'",
        "fake_gpu": missing_requirement(),
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def betons(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train, val): 150 and 37 real 32x32 images in ten classes."""
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


@pytest.fixture(scope="module")
def mcmae() -> dict[str, Tensor]:
    return load_reference("mcmae")


@pytest.fixture(scope="module")
def mae() -> dict[str, Tensor]:
    return load_reference("mae")


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only one of a gloo group; its store is in memory, so no port is taken."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None  # DeepSpeed keeps its copy of the group that is gone
