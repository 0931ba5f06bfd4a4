"""Gathers of ZeRO-3 against hand-computed examples and measurements of DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.planning.parameters import count_parameters
from mrmae_ds.planning.zero3_gathers import GatheredParam, GatherTrace, GatherUnit, trace_gathers
from tests.training.parity.gathers import elements, huge

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks/results/gather_volume_cpu.json"
EVERYTHING = 10**12


def sequence(*sizes: int, leaf: bool = True) -> GatherUnit:
    """Return a model of modules with one parameter each that run in sequence."""
    return GatherUnit(children=tuple(GatherUnit((GatheredParam(size),), leaf) for size in sizes))


def gather(model: GatherUnit, **settings: Any) -> GatherTrace:
    return trace_gathers(model, replace(ZeroSettings(3, autocast=False, bf16=False, prefetch_bucket=0), **settings))


def test_without_reuse_all_parameters_are_gathered_twice() -> None:
    trace = gather(sequence(5, 7, 11), max_reuse=0, max_live=0)
    # Including the last, although nothing runs between its forward and backward.
    assert trace.gathered == 2 * (5 + 7 + 11)
    assert trace.calls == 6
    # One at a time.
    assert trace.forward == 11
    assert [available for _, available in trace.backward] == [0, 11, 7, 5]
    assert [completed for completed, _ in trace.backward] == [0, 0, 11, 18]


def test_with_reuse_all_parameters_are_gathered_once_and_released_in_backward() -> None:
    trace = gather(sequence(5, 7, 11), max_reuse=EVERYTHING)
    assert (trace.gathered, trace.calls, trace.forward) == (23, 3, 23)
    assert [available for _, available in trace.backward] == [23, 23, 12, 5]


def test_parameters_within_reuse_distance_are_kept() -> None:
    # After the second module, forward and backward of 11 elements precede its own backward.
    modules = sequence(5, 7, 11, leaf=False)
    assert gather(modules, max_reuse=22).gathered == 2 * 5 + 2 * 7 + 11
    assert gather(modules, max_reuse=23).gathered == 2 * 5 + 7 + 11
    # Between the uses of the first are 2 * (7 + 11) elements.
    assert gather(modules, max_reuse=36).gathered == 2 * 5 + 7 + 11
    assert gather(modules, max_reuse=37).gathered == 5 + 7 + 11


def test_prefetch_is_limited_by_bucket_and_live_parameters() -> None:
    modules = sequence(4, 4, 4, 4)
    assert gather(modules, max_reuse=EVERYTHING, prefetch_bucket=8).calls < 4
    # No room to prefetch: each parameter is gathered when it is used.
    assert gather(modules, max_reuse=EVERYTHING, prefetch_bucket=8, max_live=4).calls == 4
    assert gather(modules, max_reuse=0, max_live=8, prefetch_bucket=4).forward == 8


def test_parameters_without_backward_are_gathered_and_released_in_forward() -> None:
    average = replace(sequence(3, 2), forward_only=True)
    model = GatherUnit(children=(average, sequence(5, 7)))
    trace = gather(model, max_reuse=0, max_live=0)
    assert (trace.gathered, trace.calls) == (3 + 2 + 2 * (5 + 7), 6)
    assert trace.backward == ((0, 0), (0, 0), (0, 7), (7, 5))
    # For a leaf, the model's own backward counts as a use of all parameters inside it.
    trace = gather(model, max_reuse=EVERYTHING)
    assert (trace.gathered, trace.forward) == (3 + 2 + 5 + 7, 3 + 2 + 5 + 7)
    assert trace.backward[-1] == (7, 5 + 3 + 2)


def measured() -> Iterator[tuple[str, float]]:
    """Yield the settings of benchmarks/gather_volume.py and the gathered volume per step, in models."""
    for name, steps in json.loads(MEASURED.read_text())["steps"].items():
        yield name, steps[-1]["models"]


@pytest.fixture(scope="module")
def model() -> PretrainModel:
    return huge(narrow=True)


@pytest.mark.parametrize(("name", "models"), measured())
def test_equals_measured_gather_volume(name: str, models: float, model: nn.Module) -> None:
    total, whole = elements(model), elements(huge(narrow=False))
    ratio = total / whole
    limits = {"reuse": 3 * 10**9, "live": 3 * 10**9}
    if name.startswith("reuse distance"):
        share = round(float(name.split()[-2]) * whole)
        limits = {"reuse": share, "live": share if "live" in name else limits["live"]}
    elif "1e" in name:
        each = 10**9 if "1e9" in name else 10**8
        limits = {"reuse": each, "live": each}
    zero = ZeroSettings(
        stage=3,
        autocast=name == "autocast",
        bf16=False,
        prefetch_bucket=round(50_000_000 * ratio),
        max_reuse=round(limits["reuse"] * ratio),
        max_live=round(limits["live"] * ratio),
        leaves=() if name == "no leaf modules" else ("Block", "ConvBlock"),
    )
    counts = count_parameters(model, zero, [total])
    trace = trace_gathers(counts.modules, zero)
    # With accumulation too: the second micro-batch finds the parameters gathered.
    assert trace.gathered / total == pytest.approx(models, abs=0.06)
    if zero.autocast:
        assert trace.low == counts.low > 0.8 * total
