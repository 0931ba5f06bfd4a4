"""Twenty steps of every stage give the stored losses, rates, gradient norms, results and weights to the last digit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.golden.record import LOSSES, MADE_BY, RUNS, STEPS
from tests.support.pinned import PINNED, incomparable
from tests.support.processes import environment, run

MADE = json.loads((LOSSES / MADE_BY).read_text())
BFLOAT16 = "pretrain_mrmae_bf16"
pytestmark = [
    pytest.mark.skipif(bool(incomparable(MADE)), reason=f"golden losses: {incomparable(MADE)}"),
    pytest.mark.multi_process,
]


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what this code computes."""
    folder = tmp_path_factory.mktemp("golden")
    done = run([sys.executable, "-m", "tests.golden.record", folder], 240, environment(**PINNED))
    assert done.status == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["data", *RUNS])
def test_equal_to_the_last_digit(name: str, again: Path) -> None:
    if name == BFLOAT16 and (reason := incomparable(MADE, bfloat16=True)):
        pytest.skip(f"golden losses: {reason}")
    stored, ours = (json.loads((folder / f"{name}.json").read_text()) for folder in (LOSSES, again))
    for expected, line in zip(stored.get("lines", ()), ours.get("lines", ()), strict=True):
        assert line == expected, f"{name}: step {expected['step']} is the first that differs"
    assert ours == stored


@pytest.mark.parametrize("name", [name for name in RUNS if name != "evaluate"])
def test_every_step_is_stored(name: str) -> None:
    lines: list[dict[str, Any]] = json.loads((LOSSES / f"{name}.json").read_text())["lines"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["skipped_steps"] == 0 for line in lines)
