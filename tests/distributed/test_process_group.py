from __future__ import annotations

import pytest
import torch

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.process_group import choose_device
from mrmae_ds.errors import UserError


class FakeAccelerator:
    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def device_name(self) -> str:
        return self.name

    def device_count(self) -> int:
        return self.count


@pytest.mark.parametrize(
    ("name", "count", "local_rank", "expected"),
    [
        ("cpu", 2, 1, torch.device("cpu")),
        ("cuda", 4, 0, torch.device("cuda", 0)),
        ("cuda", 4, 3, torch.device("cuda", 3)),
        ("cuda", 1, 3, torch.device("cuda", 0)),  # each task of srun sees the one GPU that is bound to it
    ],
)
def test_chooses_the_device_of_a_rank(
    name: str, count: int, local_rank: int, expected: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrmae_ds.distributed.process_group.get_accelerator", lambda: FakeAccelerator(name, count))
    assert choose_device(Launch(local_rank, local_rank, 8, 4)) == expected


def test_rejects_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrmae_ds.distributed.process_group.get_accelerator", lambda: FakeAccelerator("cuda", 2))
    with pytest.raises(UserError, match=r"4 ranks on this node but only 2 GPUs; start 2 ranks per node"):
        choose_device(Launch(2, 2, 4, 4))


def test_every_rank_rejects_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrmae_ds.distributed.process_group.get_accelerator", lambda: FakeAccelerator("cuda", 2))
    with pytest.raises(UserError, match="2 GPUs"):
        choose_device(Launch(0, 0, 4, 4))
