"""FLOPs, bytes and time of the operators of a micro-batch, against formulas and an independent pricing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.planning.activation_trace import TensorRecorder, trace_timeline
from mrmae_ds.planning.estimates.rates import device_rates
from mrmae_ds.planning.fake_step import build_meta_task, trace_micro_batch
from mrmae_ds.planning.operator_trace import (
    ATTENTION,
    CONVOLUTION,
    KINDS,
    MATMUL,
    MATMUL_FP32,
    MEMORY,
    VIEW,
    DeviceRates,
    Operators,
)
from mrmae_ds.profiling.flops import flop_counter
from mrmae_ds.profiling.gpus import find_gpu
from mrmae_ds.profiling.measured_node import MeasuredNode

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
WIDTH = 32


def trace(run: nn.Module, *shape: int) -> Operators:
    """Trace a module, forward only, on inputs of ``shape`` per image."""

    def micro_batch(images: int) -> TensorRecorder:
        recorder = TensorRecorder([run])
        with torch.no_grad(), recorder:
            run(torch.empty(images, *shape))
        return recorder

    return trace_timeline(micro_batch).operators


def test_costs_of_a_linear_layer_and_a_sum() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).transpose(0, 1) + 1.0

    with FakeTensorMode():
        found = trace(Layer(), WIDTH)
    assert found.kinds == (MATMUL_FP32, MEMORY)  # views run no kernel
    for images in (1, 10):
        assert found.total_flops(images) == 2 * images * WIDTH * 2 * WIDTH
        output = images * 2 * WIDTH * 4
        weights = (WIDTH * 2 * WIDTH + 2 * WIDTH) * 4
        rates = DeviceRates({MATMUL_FP32: 1e30}, dict.fromkeys(KINDS, 1.0), 0.0)
        # The addition reads and writes the output.
        assert list(found.seconds(images, rates)) == [images * WIDTH * 4 + weights + output, 2 * output]


def test_an_operator_takes_the_longest_of_three() -> None:
    flops, sizes = np.array([[0.0, 0.0], [6.0, 1.0]]), np.array([[1.0, 0.0], [2.0, 4.0]])
    operators = Operators((MATMUL, MEMORY), flops, sizes, ("mm", "add"))
    rates = DeviceRates({MATMUL: 2.0}, dict.fromkeys(KINDS, 1.0), kernel_s=4.5)
    assert list(operators.seconds(1, rates)) == [4.5, 4.5]  # 3 of FLOPs and 3 of bytes, 4 of bytes
    assert list(operators.seconds(2, rates)) == [6.0, 8.0]
    assert list(operators.seconds(2, replace(rates, flops={MATMUL: 1.0}))) == [12.0, 8.0]
    # An operator's own rate is used in place of its kind's.
    assert list(operators.seconds(2, replace(rates, sizes=rates.sizes | {"add": 0.5}))) == [6.0, 16.0]


def test_attention_has_four_products_and_convolutions_count_groups() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(x).flatten(2)  # [B, 8, 16], 8 tokens of width 16
            return F.scaled_dot_product_attention(*(tokens.unsqueeze(1),) * 3)

    with FakeTensorMode():
        found = trace(Both(), 8, 4, 4)
    flops = {kind: found.flops[1][i] for i, kind in enumerate(found.kinds)}
    assert flops == {CONVOLUTION: 2 * 8 * 16 * 25, ATTENTION: 2 * 2 * 8 * 8 * 16}


def test_a_fused_attention_layer_has_the_flops_of_its_parts() -> None:
    layer = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    x = torch.randn(2, 6, WIDTH)
    with flop_counter() as parts, torch.no_grad():
        layer.train()(x, x, x, need_weights=False)
    with TensorRecorder([layer]) as recorder, torch.no_grad():
        layer.eval()(x, x, x, need_weights=False)
    (cost,) = (cost for cost in recorder.costs if cost.kind != VIEW)
    assert (cost.name, cost.kind) == ("_native_multi_head_attention", MATMUL_FP32)
    # On the CPU, torch's counter has no formula for the two products.
    assert cost.flops == parts.get_total_flops() + 2 * 2 * (2 * 6 * 6 * WIDTH)


def operators_of(name: str, plan: CheckpointPlan) -> Operators:
    """Return the operators of a recipe's pre-training."""
    config = replace(load_engine_config(CONFIGS / f"{name}.json"), checkpointing=plan)
    task = build_meta_task(load_recipe(CONFIGS / f"{name}.yaml"), "pretrain", config, 1000)
    return trace_micro_batch(task, config).operators


H100 = device_rates(find_gpu("h100-80"), MeasuredNode())
ALL_CONV = CheckpointPlan(conv_stages=1)
# Number of operators, and ms of micro-batches on an H100, from a separate program: real CUDA tensors on the GPU
# stand-in, the same assumptions.
PRICED = [
    pytest.param("base", ALL_CONV, 1712, {16: 8.1, 128: 54.5}, id="base"),
    pytest.param("base", CheckpointPlan(), 1616, {128: 50.5}, id="base-plain", marks=pytest.mark.slow),
    pytest.param("small", CheckpointPlan(), 1616, {128: 38.8}, id="small-plain", marks=pytest.mark.slow),
    pytest.param("large", CheckpointPlan(), 2240, {128: 81.1}, id="large-plain", marks=pytest.mark.slow),
    pytest.param("huge", CheckpointPlan(1, 1), 3449, {16: 29.5, 64: 101.0}, id="huge", marks=pytest.mark.slow),
    pytest.param("huge", CheckpointPlan(), 2795, {64: 87.2}, id="huge-plain", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "plan", "count", "milliseconds"), PRICED)
def test_time_of_a_micro_batch_on_an_h100(
    name: str, plan: CheckpointPlan, count: int, milliseconds: dict[int, float]
) -> None:
    operators = operators_of(name, plan)
    assert len(operators) == pytest.approx(count, rel=0.03) and H100 is not None
    for images, expected in milliseconds.items():
        assert 1000 * operators.seconds(images, H100).sum() == pytest.approx(expected, rel=0.03)
