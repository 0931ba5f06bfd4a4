"""Operators that the planner counts, against those that a micro-batch issues on CUDA tensors (the GPU stand-in)."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.planning.fake_step import build_meta_task, trace_micro_batch
from tests.support.fake_gpu import preload
from tests.support.processes import REPOSITORY, environment, run

pytestmark = [pytest.mark.fake_gpu, pytest.mark.multi_process]
SHORT = ("model.overrides={depths: [1, 1, 2]}", "model.decoder={depth: 2}")
# Attention, norms, sums and sorting launch several kernels, some copies none.
KERNELS_OF_AN_OPERATOR = (1.0, 1.4)
SIZES = [pytest.param(name, (), id=name, marks=pytest.mark.slow) for name in ("small", "base", "large", "huge")]


def issued(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the counts of :mod:`tests.planning.issued`."""
    command = [sys.executable, "-m", "tests.planning.issued", name, *overrides]
    done = run(command, 300, environment(**preload.variables(timing=True)))
    assert done.status == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("name", "overrides"), [pytest.param("small", SHORT, id="short"), *SIZES])
def test_the_planner_counts_the_operators_that_are_issued(name: str, overrides: tuple[str, ...]) -> None:
    """They are equal, except that a teacher's attention layer is one operator under CUDA and its parts in the trace."""
    config = load_engine_config(REPOSITORY / f"ds_configs/{name}.json")
    recipe = load_recipe(REPOSITORY / f"ds_configs/{name}.yaml", list(overrides))
    task = build_meta_task(recipe, "pretrain", config, 1000)
    counted, found = len(trace_micro_batch(task, config).operators), issued(name, overrides)
    parts = (counted - found["operators"]) / found["fused_layers"]
    assert 3 < parts < 4
    low, high = KERNELS_OF_AN_OPERATOR
    assert low * counted < found["launches"] + found["library_calls"] < high * counted
