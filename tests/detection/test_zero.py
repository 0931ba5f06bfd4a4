"""Ranks without objects under ZeRO train as one process does, and no rank waits for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.detector_worker import CASES, measure, train_alone
from tests.support.ranks import run_in_group

pytestmark = [pytest.mark.timeout(300), pytest.mark.multi_process, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses and weights of two ranks."""
    folder = tmp_path_factory.mktemp("zero")
    run_in_group(measure, 2, folder, limit_s=200)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ranks_without_objects_train_as_one_process(case: str, folder: Path) -> None:
    losses, weights = train_alone(case)
    for zero in (2, 3):
        found, state = torch.load(folder / f"{case}-{zero}.pt")
        assert found == pytest.approx(losses, rel=1e-6)
        assert state.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
