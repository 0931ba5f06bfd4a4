"""Parity: scaled engines compute the same as one plain torch process.

``python benchmarks/parity.py`` prints the complete matrix. Here are the engines that differ most, in one start of one
rank and one of two; the complete matrix is slow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.training.parity.cases import (
    CLIPPED,
    TOLERANCE,
    Case,
    Difference,
    Trace,
    average_cases,
    beside_the_matrix,
    compiled_cases,
    difference,
    matrix,
    method_cases,
    nvme_cases,
)
from tests.training.parity.engine import run_cases
from tests.training.parity.job import overrides, write_workspace
from tests.training.parity.plain import run_plain

LIMIT_S = 600
pytestmark = [pytest.mark.timeout(900), pytest.mark.multi_process]

_CPU = {"device": "cpu"}
_ALL = {"zero_optimization": {"offload_optimizer": _CPU, "offload_param": _CPU}}
FEW = [
    Case("pretrain", 0, True, 2),
    Case("pretrain", 3, True, 1, placement="stream"),
    Case("pretrain", 1, True, 2, 2, placement="step"),
    Case("pretrain", 2, True, 1, 2, clipping=CLIPPED["pretrain"]),
    Case("pretrain", 3, True, 2, 2, placement="sharded"),
    Case("pretrain", 3, False, 1, 2),
    # Before the case of hpZ, whose second copies DeepSpeed also gives to later engines of the process.
    Case("pretrain", 3, True, 2, 2, average=True),
    Case("pretrain", 3, True, 2, 2, recipe="methods/data2vec_tiny"),
    Case("pretrain", 3, False, 4, 2, "autocast"),  # two micro-batches between the first and the last
    Case("finetune", 2, True, 2, 2),
    Case("finetune", 3, True, 2, 2),
    Case("finetune", 3, True, 2, 2, "autocast"),
    Case("finetune", 3, True, 2, 2, engine={"zero_optimization": {"contiguous_gradients": True}}, label="contiguous"),
    Case("finetune", 3, True, 2, 2, "bf16"),
    Case("finetune", 3, True, 2, 2, engine=_ALL, label="offload_all"),
    Case("finetune", 3, True, 2, 1, "autocast", engine=_ALL, label="offload_all"),  # as NAME-offload.json
    Case("finetune", 3, True, 2, 2, engine={"zero_optimization": {"zero_hpz_partition_size": 2}}, label="hpz"),
    Case("detect", 3, True, 2, 2),
    Case("pretrain", 3, True, 2, 2, recipe="methods/milan_tiny"),
    Case("pretrain", 3, True, 2, 2, placement="sharded", recipe="methods/dmae_tiny"),
    Case("pretrain", 3, True, 2, 2, placement="step", recipe="methods/maskalign_tiny"),
    Case("pretrain", 3, True, 2, 2, placement="stream", recipe="methods/mvp_tiny"),
]
EVERY = [*matrix(), *beside_the_matrix(), *method_cases(), *average_cases(), *compiled_cases(1), *compiled_cases(2)]
Compare = Callable[[Case], Difference]


def _comparison(cases: list[Case], folder: Path, limit_s: float) -> Compare:
    write_workspace(folder)
    torch.set_num_threads(1)
    traces = run_cases(cases, folder, limit_s)

    @cache
    def plain(reference: str) -> Trace:
        return run_plain(next(case for case in cases if case.reference == reference), folder)

    return lambda case: difference(traces[case.name], plain(case.reference))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compare:
    return _comparison(FEW, tmp_path_factory.mktemp("parity"), LIMIT_S)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_an_engine_trains_like_one_plain_process(case: Case, compared: Compare) -> None:
    found = compared(case)
    assert found.within(case.tolerance), found


def test_the_comparison_detects_errors() -> None:
    """A wrong or NaN loss, norm or weight is outside every tolerance; a key's bias is not."""

    def trace(loss: float = 1.0, norm: float = 1.0, weight: float = 1.0, bias: int | None = None) -> Trace:
        qkv = torch.ones(6)
        if bias is not None:
            qkv[bias] = 2.0
        weights = {"attn.qkv.bias": qkv, "attn.kv.bias": qkv[2:], "weight": torch.tensor([1.0, weight])}
        return Trace([1.0, loss], [1.0, norm], weights, 0.0)

    exact, nan = trace(), float("nan")
    assert difference(exact, exact) == Difference(0.0, 0.0, 0.0)
    assert difference(trace(bias=2), exact) == Difference(0.0, 0.0, 0.0)
    assert difference(trace(loss=1.5, norm=0.5, weight=3.0), exact) == Difference(0.5, 0.5, 2.0)
    loosest = TOLERANCE["bf16"]
    for wrong in (1.01, 0.99, nan, float("inf")):
        for values in ({"loss": wrong}, {"norm": wrong}, {"weight": wrong}):
            assert not difference(trace(**values), exact).within(loosest)
    for index in (0, 5):
        assert not difference(trace(bias=index), exact).within(loosest)


def test_the_matrix_is_complete() -> None:
    assert len(matrix()) == 4 * 2 * 2 * 2 * (4 + 1 + 1)
    names = [case.name for case in EVERY]
    assert len(set(names)) == len(names)


def test_cases_of_one_reference_train_one_recipe() -> None:
    """Values of a recipe that are not in the reference's name would compare an engine with another training."""
    recipes = defaultdict(set)
    for case in EVERY:
        recipes[case.reference].add((case.recipe, overrides(replace(case, placement="device"), Path("folder"))))
    assert [reference for reference, found in recipes.items() if len(found) > 1] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2])
def test_offloading_to_nvme_equals_plain_torch(world_size: int, tmp_path: Path) -> None:
    """Needs libaio; DeepSpeed first compiles its I/O operations, for minutes."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is not installed")
    cases = nvme_cases(tmp_path, world_size)
    compare = _comparison(cases, tmp_path, limit_s=1500)
    for case in cases:
        found = compare(case)
        assert found.within(case.tolerance), (case.name, found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_blocks_equal_plain_torch(world_size: int, tmp_path: Path) -> None:
    """Inductor compiles C++ for minutes."""
    cases = compiled_cases(world_size)
    compare = _comparison(cases, tmp_path, limit_s=1500)
    for case in cases:
        found = compare(case)
        assert found.within(case.tolerance), (case.name, found)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_engine_variant_equals_plain_torch(tmp_path: Path) -> None:
    cases = [*matrix(), *beside_the_matrix()]
    compare = _comparison(cases, tmp_path, limit_s=2500)
    found = {case.name: (compare(case), case.tolerance) for case in cases}
    wrong = {name: value for name, (value, bound) in found.items() if not value.within(bound)}
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_other_methods_train_like_one_plain_process(tmp_path: Path) -> None:
    cases = method_cases()
    compare = _comparison(cases, tmp_path, limit_s=2500)
    wrong = {case.name: found for case in cases if not (found := compare(case)).within(case.tolerance)}
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_moving_averages_follow_as_in_one_plain_process(tmp_path: Path) -> None:
    """Their weights are among those compared."""
    cases = average_cases()
    compare = _comparison(cases, tmp_path, limit_s=1500)
    assert not {case.name: found for case in cases if not (found := compare(case)).within(case.tolerance)}
