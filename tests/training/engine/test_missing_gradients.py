from __future__ import annotations

import pytest
import torch
from torch import nn

from mrmae_ds.training.engine.missing_gradients import watch_gradients
from tests.support.jobs import FakeEngine


class Branches(nn.Module):
    """Two layers, each used only if named, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = (nn.Linear(2, 1, bias=False) for _ in range(3))
        self.frozen.requires_grad_(False)

    def loss(self, *names: str) -> torch.Tensor:
        return torch.stack([getattr(self, name)(torch.ones(2)).sum() for name in (*names, "frozen")]).sum()


@pytest.fixture
def watched() -> FakeEngine:
    engine = FakeEngine(Branches(), accumulation=2)
    watch_gradients(engine)
    return engine


def test_accepts_a_loss_of_every_parameter(watched: FakeEngine) -> None:
    for _ in range(3):
        watched.backward(watched.module.loss("first", "second"))
    gradient = watched.module.first.weight.grad
    assert gradient is not None and gradient.tolist() == [[1.5, 1.5]]  # three halves: the loss was passed to the engine


def test_names_a_parameter_without_gradient(watched: FakeEngine) -> None:
    watched.backward(watched.module.loss("first", "second"))
    # Its gradient of the previous micro-batch still exists; only the current one counts.
    with pytest.raises(RuntimeError, match=r"no gradient reached second\.weight: .*freeze parameters that are"):
        watched.backward(watched.module.loss("first"))
    with pytest.raises(RuntimeError, match=r"no gradient reached first\.weight, second\.weight: "):
        watched.backward(torch.ones(1, requires_grad=True).sum())


def test_names_some_of_many() -> None:
    engine = FakeEngine(nn.Sequential(*(nn.Linear(1, 1) for _ in range(4))), accumulation=1)
    watch_gradients(engine)
    with pytest.raises(RuntimeError, match=r"reached 0\.weight, 0\.bias, 1\.weight, 1\.bias, 2\.weight and 3 more:"):
        engine.backward(torch.ones(1, requires_grad=True).sum())
