"""Operators that the doctor measures: the bytes that it counts are those of the planner, and the planner has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mrmae_ds.doctor.operators import operator_readings
from mrmae_ds.planning.activation_trace import TensorRecorder
from mrmae_ds.planning.operator_trace import MATMUL_FP32, VIEW
from mrmae_ds.profiling.measured_node import ADAMW, GRADIENTS
from mrmae_ds.units import GIGA, TERA


def test_bytes_and_flops_are_those_that_the_planner_counts() -> None:
    names: list[set[str]] = []

    def measure(run: Callable[[], object]) -> float:
        """Return the seconds at 1 GB/s, or 1 TFLOP/s for products."""
        with TensorRecorder([]) as recorder:
            run()
        costs = [cost for cost in recorder.costs if cost.kind != VIEW]
        names.append({cost.name for cost in costs})
        if all(cost.kind == MATMUL_FP32 for cost in costs):
            return sum(cost.flops for cost in costs) / TERA
        return sum(cost.size for cost in costs) / GIGA

    products, *others, gradients, update = operator_readings(torch.device("cpu"), 1, measure)
    assert products.constant == "fp32_tflops" and products.value == pytest.approx(1.0)
    assert [{reading.name} for reading in others] == names[1:-2] and len(others) == 11
    for reading in others:
        assert reading.constant == f"operator_gb_s.{reading.name}"
        assert reading.value == pytest.approx(1.0, rel=0.02), reading.name
    # The planner counts the tensor that a copy overwrites among the inputs of the copy: eight times the gradients.
    assert gradients.constant == f"operator_gb_s.{GRADIENTS}" and gradients.value == pytest.approx(7 / 8)
    assert update.constant == f"operator_gb_s.{ADAMW}"


def test_operators_for_which_no_time_is_left_are_listed() -> None:
    asked: list[bool] = []

    def time_is_left() -> bool:
        asked.append(len(asked) < 2)
        return asked[-1]

    readings = operator_readings(torch.device("cpu"), 1, lambda run: 1.0, time_is_left)
    assert [reading.constant is None for reading in readings] == [False] * 3 + [True] * (len(readings) - 3)
    assert len(asked) == len(readings) - 1 == 13
    assert {(r.name.partition(": ")[2], r.value) for r in readings[3:]} == {("not run", "no time left")}
