"""What ZeRO-3 gathers, by hand, and as DeepSpeed was measured to gather it."""

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
from mrmae_ds.planning.parameters import parameter_counts
from mrmae_ds.planning.zero3_gathers import GatheredParam, Gathering, GatherUnit, follow
from tests.training.parity.gathers import elements, huge

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks/results/gather_volume_cpu.json"
EVERYTHING = 10**12


def chain(*sizes: int, leaf: bool = True) -> GatherUnit:
    """A model of modules with one parameter each, that run one after another."""
    return GatherUnit(children=tuple(GatherUnit((GatheredParam(size),), leaf) for size in sizes))


def gather(model: GatherUnit, **settings: Any) -> Gathering:
    return follow(model, replace(ZeroSettings(3, autocast=False, bf16=False, prefetch_bucket=0), **settings))


def test_without_reuse_everything_is_gathered_for_forward_and_for_backward() -> None:
    told = gather(chain(5, 7, 11), max_reuse=0, max_live=0)
    # Even the last one, although nothing runs between its forward and its backward.
    assert told.gathered == 2 * (5 + 7 + 11)
    assert told.calls == 6
    # One at a time.
    assert told.forward == 11
    assert [there for _, there in told.backward] == [0, 11, 7, 5]
    assert [finished for finished, _ in told.backward] == [0, 0, 11, 18]


def test_with_reuse_everything_is_gathered_once_and_leaves_as_backward_has_used_it() -> None:
    told = gather(chain(5, 7, 11), max_reuse=EVERYTHING)
    assert (told.gathered, told.calls, told.forward) == (23, 3, 23)
    assert [there for _, there in told.backward] == [23, 23, 12, 5]


def test_what_is_used_again_soon_is_kept() -> None:
    # After the second has run, 11 elements and then the backward of 11 come before its own.
    modules = chain(5, 7, 11, leaf=False)
    assert gather(modules, max_reuse=22).gathered == 2 * 5 + 2 * 7 + 11
    assert gather(modules, max_reuse=23).gathered == 2 * 5 + 7 + 11
    # Between the uses of the first there are 2 * (7 + 11).
    assert gather(modules, max_reuse=36).gathered == 2 * 5 + 7 + 11
    assert gather(modules, max_reuse=37).gathered == 5 + 7 + 11


def test_what_comes_next_is_gathered_ahead_as_far_as_the_bucket_and_the_limit_go() -> None:
    modules = chain(4, 4, 4, 4)
    assert gather(modules, max_reuse=EVERYTHING, prefetch_bucket=8).calls < 4
    # No room for what comes: each is gathered as it is needed.
    assert gather(modules, max_reuse=EVERYTHING, prefetch_bucket=8, max_live=4).calls == 4
    assert gather(modules, max_reuse=0, max_live=8, prefetch_bucket=4).forward == 8


def measured() -> Iterator[tuple[str, float]]:
    """Settings of benchmarks/gather_volume.py and how many models a step gathered, once DeepSpeed knew the order."""
    for name, steps in json.loads(MEASURED.read_text())["steps"].items():
        yield name, steps[-1]["models"]


@pytest.fixture(scope="module")
def model() -> PretrainModel:
    return huge(narrow=True)


@pytest.mark.parametrize(("name", "models"), measured())
def test_as_much_as_deepspeed_was_measured_to_gather(name: str, models: float, model: nn.GatherUnit) -> None:
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
    census = parameter_counts(model, zero, [total])
    told = follow(census.modules, zero)
    times = 2 if name == "accumulation 2" else 1
    assert times * told.gathered / total == pytest.approx(models, abs=0.06)
    if zero.autocast:
        assert told.low == census.low > 0.8 * total
