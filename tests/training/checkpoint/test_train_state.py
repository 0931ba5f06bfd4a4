"""State of training on several ranks: the files each rank reads, and the state restored on other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.training.checkpoint.train_state import TrainState, load_state, state_file
from mrmae_ds.training.meter import Meter
from tests.support.ranks import run_in_group

pytestmark = pytest.mark.multi_process

CPU = torch.device("cpu")
SAVED_BY, MICRO_BATCH = 2, 4


def _module(rank: int) -> nn.Module:
    module = nn.BatchNorm1d(2)
    module(torch.full((4, 2), float(rank)))
    return module


def _state(rank: int) -> TrainState:
    """State of a rank, with losses and random state of its own."""
    torch.manual_seed(rank)
    meter = Meter(data_wait_s=float(rank))
    meter.add({"loss": torch.tensor(0.1 + rank), "part": torch.tensor(3.0 * rank)})
    meter.add({"loss": torch.tensor(float("nan")), "part": torch.tensor(1.0)})
    return TrainState(step=12, skipped=2, bad_in_row=1, grad_norm=0.5, meter=meter)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of two ranks."""
    for rank in range(SAVED_BY):
        state = _state(rank).to_save(_module(rank), MICRO_BATCH, CPU)
        torch.save(state, tmp_path / state_file(rank))
    return tmp_path


def _load(rank: int, world_size: int, checkpoint: Path, out: Path) -> None:
    """Load on one rank; return the files read and the restored state."""
    read: list[str] = []
    plain = torch.load

    def load(file: Any, **options: Any) -> Any:
        if isinstance(file, Path):  # excluding what a collective operation unpickles
            read.append(file.name)
        return plain(file, **options)

    torch.load = load  # type: ignore[assignment]
    module = _module(9)
    launch = Launch(rank, rank, world_size, world_size)
    state = load_state(checkpoint, SAVED_BY, module, launch, MICRO_BATCH, CPU)
    torch.load = plain
    restored = state.to_save(module, MICRO_BATCH, CPU)
    torch.save({"read": read, "state": restored}, out / f"{rank}.pt")


def _loaded(world_size: int, checkpoint: Path) -> list[dict[str, Any]]:
    out = checkpoint / "out"
    out.mkdir()
    run_in_group(_load, world_size, checkpoint, out)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.parametrize(
    ("world_size", "read"),
    [
        (1, [["rank_00000.pt", "rank_00001.pt"]]),
        (2, [["rank_00000.pt"], ["rank_00001.pt"]]),
        (3, [["rank_00000.pt"], ["rank_00001.pt"], ["rank_00000.pt"]]),
    ],
)
def test_each_rank_reads_one_file_and_restores_the_state_of_all(
    world_size: int, read: list[list[str]], checkpoint: Path
) -> None:
    states = [torch.load(checkpoint / state_file(rank), weights_only=True) for rank in range(SAVED_BY)]
    for rank, loaded in enumerate(_loaded(world_size, checkpoint)):
        assert loaded["read"] == read[rank]
        own, restored = states[rank if rank < SAVED_BY else 0], loaded["state"]
        for key in ("step", "skipped", "bad_in_row", "grad_norm"):
            assert restored[key] == own[key]
        assert torch.equal(restored["random"]["torch"], own["random"]["torch"])
        assert all(torch.equal(restored["buffers"][name], buffer) for name, buffer in own["buffers"].items())
        launch = Launch(rank, rank, world_size, world_size)
        expected = Meter.restored([state["meter"] for state in states], launch, MICRO_BATCH, CPU).state()
        meter = restored["meter"]
        assert meter["sums"].keys() == expected["sums"].keys()
        assert all(torch.equal(meter["sums"][name], value) for name, value in expected["sums"].items())
        assert torch.equal(meter["nonfinite"], expected["nonfinite"])
        assert (meter["batches"], meter["waited"]) == (expected["batches"], expected["waited"])


def test_rejects_a_module_with_other_buffers(checkpoint: Path, alone: None) -> None:
    with pytest.raises(ValueError, match="buffers differ"):
        load_state(checkpoint, SAVED_BY, nn.Linear(2, 2), Launch(0, 0, 1, 1), MICRO_BATCH, CPU)
