from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed import comm
from torch import Tensor

from mrmae_ds.training.engine.comm_volume import GatherCounter


class FakeBackend:
    """Backend that DeepSpeed's communication calls; records the shapes it receives."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def is_initialized(self) -> bool:
        return True

    def all_gather_into_tensor(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool) -> str:
        self.received.append((tuple(output_tensor.shape), async_op))
        return "handle"

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, group: Any, async_op: bool) -> str:
        self.received.append((len(tensor_list), async_op))
        return "list's handle"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    fake = FakeBackend()
    monkeypatch.setattr(comm.comm, "cdb", fake)
    return fake


def _gather(elements: int, dtype: torch.dtype = torch.float32) -> Any:
    return comm.all_gather_into_tensor(torch.zeros(elements, dtype=dtype), torch.zeros(1, dtype=dtype), async_op=True)


def test_counts_gathers_in_their_own_type(backend: FakeBackend) -> None:
    counter = GatherCounter()
    counter.install(None)
    assert _gather(10) == "handle"
    _gather(6, torch.bfloat16)
    parts = [torch.zeros(3), torch.zeros(3)]
    assert comm.all_gather(parts, torch.zeros(3)) == "list's handle"
    assert (counter.bytes, counter.calls) == (40 + 12 + 24, 3)
    assert backend.received == [((10,), True), ((6,), True), (2, False)]


def test_counters_start_and_stop_in_any_order(backend: FakeBackend) -> None:
    first, second = GatherCounter(), GatherCounter()
    first.install(None)
    first.install(None)  # without effect
    _gather(1)
    second.install(None)
    _gather(1)
    first.close()
    first.close()
    _gather(1)
    first.install(None)
    second.close()
    _gather(1)
    assert (first.calls, second.calls) == (3, 2)
    first.close()
    assert len(backend.received) == 4
