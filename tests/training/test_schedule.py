from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from mrmae_ds.config.optimizers import lr_at_epoch

CASES = json.loads((Path(__file__).parent / "schedule.json").read_text())["cases"]


@pytest.mark.parametrize("name", CASES)
def test_rates_are_those_of_the_authors_code(name: str) -> None:
    case = CASES[name]
    assert len(case["lr_at_epoch"]) > 5
    for epoch, expected in case["lr_at_epoch"].items():
        rate = lr_at_epoch(
            float(epoch),
            peak=case["lr"],
            floor=case["min_lr"],
            warmup_epochs=case["warmup_epochs"],
            epochs=case["epochs"],
        )
        assert rate == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_lr_at_the_ends_of_warm_up_and_decay() -> None:
    settings = {"peak": 2.0, "floor": 0.5, "warmup_epochs": 4, "epochs": 20}
    assert lr_at_epoch(0, **settings) == 0
    assert lr_at_epoch(4, **settings) == 2.0
    assert lr_at_epoch(12, **settings) == pytest.approx(1.25)
    assert lr_at_epoch(20, **settings) == pytest.approx(0.5)


def test_without_warm_up_lr_decreases_from_the_peak() -> None:
    rates = [lr_at_epoch(e / 7, peak=1.0, floor=0.1, warmup_epochs=0, epochs=5) for e in range(36)]
    assert rates[0] == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates))
