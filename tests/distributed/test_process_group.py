from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.process_group import (
    _report_slow_start,
    choose_device,
    end_process_group,
    start_process_group,
)
from mrmae_ds.errors import UserError
from tests.support.processes import free_port
from tests.support.ranks import fork_server

REPORTED = "rank 0 has waited 0.1 s for the start of 2 ranks"


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


def test_deepspeed_binds_the_one_gpu_that_a_task_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Any] = []
    accelerator = FakeAccelerator("cuda", 1)
    accelerator.set_device = bound.append  # type: ignore[attr-defined]
    monkeypatch.setattr("mrmae_ds.distributed.process_group.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: bound.append(os.environ["LOCAL_RANK"]))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    launch = Launch(3, 3, 4, 4)
    start_process_group(choose_device(launch))
    assert bound == [0, "0"] and launch.local_rank == 3


def _refuse() -> None:
    raise AssertionError("DeepSpeed's operations were probed")


def _rank(rank: int, port: int, after: Path | None, limit_s: float, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()}, MASTER_ADDR="127.0.0.1")
    while after is not None and "init_distributed" not in after.read_text():  # in the stacks, which follow the report
        time.sleep(0.05)
    vars(deepspeed.ops).pop("__compatible_ops__", None)
    deepspeed.ops._probe_compatible_ops = _refuse  # prints a warning for each operation, if there is no CUDA toolkit
    before = threading.active_count()
    # The late rank is awaited already, so it has nothing to report, however slow a loaded machine starts it.
    start_process_group(torch.device("cpu"), report_after_s=30.0 if after else 0.1, limit_s=limit_s)
    assert threading.active_count() == before
    end_process_group()
    os._exit(0)


def _start(ranks: int, limit_s: float, folder: Path) -> tuple[list[int | None], list[str]]:
    """Start the first ranks of a group of two, rank 1 once rank 0 has reported that it waits.

    Returns:
        Exit statuses, and what they wrote to stderr.
    """
    port, logs = free_port(), [folder / f"{rank}.log" for rank in range(ranks)]
    logs[0].touch()
    arguments = [(rank, port, logs[0] if rank else None, limit_s, log) for rank, log in enumerate(logs)]
    processes = [fork_server().Process(target=_rank, args=values) for values in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


@pytest.mark.multi_process
@pytest.mark.timeout(120)
def test_a_start_that_waits_names_the_settings_and_shows_its_stacks(tmp_path: Path) -> None:
    """Rank 1 comes late, then the group works and nothing of the report is left."""
    statuses, (waited, late) = _start(2, 60, tmp_path)
    assert statuses == [0, 0]
    for expected in (REPORTED, "MASTER_ADDR:MASTER_PORT (127.0.0.1:"):
        assert expected in waited
    for expected in ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "init_distributed"):
        assert expected in waited and expected not in late


@pytest.mark.multi_process
@pytest.mark.timeout(120)
def test_a_start_without_one_of_the_ranks_ends_at_the_limit(tmp_path: Path) -> None:
    statuses, (waited,) = _start(1, 2, tmp_path)
    assert statuses == [1] and REPORTED in waited
    assert "UserError: 2 ranks do not come together at 127.0.0.1:" in waited and "1/2 clients joined" in waited


def _hang() -> None:
    with _report_slow_start(report_after_s=0.5, limit_s=1.5):
        time.sleep(60)


@pytest.mark.multi_process
@pytest.mark.timeout(120)
def test_a_start_without_an_end_of_its_own_ends_at_the_limit() -> None:
    """NCCL may wait for good while it connects."""
    process = fork_server().Process(target=_hang)
    process.start()
    process.join(30)
    process.kill()
    assert process.exitcode == 1
