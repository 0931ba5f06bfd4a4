"""States, gradients and buckets against bytes per element of the ZeRO paper, on a model of 1,000 elements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.errors import UserError
from mrmae_ds.planning.parameters import ParameterCounts, count_parameters
from mrmae_ds.planning.zero3_gathers import GatheredParam, GatherUnit
from mrmae_ds.planning.zero_memory import ZeroMemory

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
# 1,000 trainable elements, 600 of which travel in bf16, and 24 frozen ones; two groups for the optimizer.
COUNTS = ParameterCounts(
    modules=GatherUnit(
        children=(
            GatherUnit((GatheredParam(600, low=True), GatheredParam(24, trainable=False)), leaf=True),
            GatherUnit((GatheredParam(400),), leaf=True),
        )
    ),
    tensors=3,
    trainable=1000,
    frozen=24,
    low=600,
    trainable_low=600,
    encoder=1024,
    largest=600,
    groups=(700, 300),
)
KEEP = 10**9
FLOAT32 = ZeroSettings(stage=3, autocast=False, bf16=False, reduce_bucket=100, max_live=KEEP, max_reuse=KEEP)


def engine(world_size: int = 4, accumulation: int = 1, on_cpu: bool = False, **settings: Any) -> ZeroMemory:
    return ZeroMemory(COUNTS, replace(FLOAT32, **settings), world_size, accumulation, on_cpu)


def test_stage_0_replicates_all_states() -> None:
    assert engine(stage=0).persistent() == {"parameters": 4 * 1024, "optimizer states": 8 * 1000}
    # Gradients accumulate during backward.
    held = engine(stage=0).in_backward(np.array([0, 400, 1000]))
    assert held["gradients"].tolist() == [0, 4 * 400, 4 * 1000]
    assert engine(stage=0).in_reduction() == {"gradients": 4000, "gradients being reduced": 4000}
    assert engine(stage=0, world_size=1).in_reduction()["gradients being reduced"] == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_partition_masters_and_states(stage: int) -> None:
    quarter = {"float32 masters": 4 * 250, "optimizer states": 8 * 250}
    assert engine(stage=stage).persistent() == {"parameters": 4 * 1024, **quarter}


def test_stage_1_keeps_all_gradients_and_stage_2_a_partition() -> None:
    completed = np.array([1000])
    assert engine(stage=1).in_backward(completed)["gradients"].tolist() == [4 * 1000]
    assert engine(stage=2).in_backward(completed)["gradients"].tolist() == [4 * 250]
    assert engine(stage=1, accumulation=2).accumulated() == {"gradients": 4 * 1000}
    assert engine(stage=2, accumulation=2).accumulated() == {"gradients": 4 * 250}
    assert engine(stage=1).accumulated() == engine(stage=3, accumulation=2).accumulated() == {}
    # Two buffers if communication overlaps.
    assert engine(stage=2, overlap=True).in_backward(completed)["reduce buckets"].tolist() == [2 * 4 * 100]


def test_stage_3_partitions_all_states() -> None:
    assert engine().persistent() == {
        "parameters": 4 * 1024 / 4,
        "reduce buckets": 4 * 100,
        "gradients": 4 * 250,
        "float32 masters": 4 * 250,
        "optimizer states": 8 * 250,
    }
    assert engine().in_forward()["gathered parameters"] == 4 * 1024
    there = engine().in_backward(np.array([0, 399, 400, 1000]))["gathered parameters"]
    # The second module is the first in backward; it is released when its 400 gradients are complete.
    assert there.tolist() == [4 * 1024, 4 * 1024, 4 * 624, 4 * 624]
    assert engine(world_size=1).in_forward() == {}


def test_stage_3_keeps_parameters_between_micro_batches_within_its_limits() -> None:
    completed = np.array([0, 1000])
    first, last = 4 * 1024, 4 * 624
    assert engine(accumulation=2).in_backward(completed)["gathered parameters"].tolist() == [first, first]
    for limits in ({"max_reuse": 2 * 1024 - 1}, {"offload_param": "nvme"}):
        assert engine(accumulation=2, **limits).in_backward(completed)["gathered parameters"].tolist() == [first, last]
    assert not engine(accumulation=2, max_live=1023).keeps_gathered


def test_gradients_wait_for_a_full_bucket_unless_they_are_copied_into_it() -> None:
    apart = engine(contiguous=False)
    assert "reduce buckets" not in apart.persistent()
    assert apart.in_backward(np.array([0, 60, 1000]))["reduce buckets"].tolist() == [0, 4 * 60, 4 * 100]
    both = engine(contiguous=False, autocast=True)
    assert both.in_backward(np.array([1000]))["reduce buckets"].tolist() == [4 * 200]


def test_full_bucket_is_copied_and_gloo_copies_it_again() -> None:
    completed = np.array([0, 99, 100, 1000])
    assert engine().in_backward(completed)["gradients being reduced"].tolist() == [0, 0, 400, 400]
    assert engine(on_cpu=True).in_backward(completed)["gradients being reduced"].tolist() == [0, 0, 800, 800]


def test_autocast_has_a_bucket_per_dtype() -> None:
    both = engine(autocast=True)
    assert both.persistent()["reduce buckets"] == (2 + 4) * 100
    # Parameters gathered in bf16 are converted to float32, which autocast casts when it computes.
    assert both.in_forward()["gathered parameters"] == 4 * 1024
    assert both.in_forward()["parameters arriving"] == 2 * 600 + 4 * 424


def test_bf16_halves_parameters_and_keeps_float32_gradients() -> None:
    states = engine(bf16=True).persistent()
    assert (states["parameters"], states["gradients"], states["reduce buckets"]) == (2 * 1024 / 4, 4 * 250, 2 * 100)
    assert states["float32 masters"] + states["optimizer states"] == 12 * 250
    # ZeRO-1 accumulates all gradients.
    one = engine(stage=1, bf16=True)
    assert one.persistent()["gradients"] == 4 * 1000
    assert one.in_backward(np.array([1000]))["gradients"].tolist() == [2 * 1000]


def test_update_copies_the_gradients_of_a_group() -> None:
    assert engine().in_update() == {"copies for the update": 4 * 700 / 4}
    assert engine(sub_group=50).in_update() == {"copies for the update": 4 * 50}
    # AdamW on the CPU allocates two more copies.
    assert engine(on_cpu=True).in_update() == {"copies for the update": 3 * 4 * 700 / 4}


def test_offloading_moves_states_to_the_host() -> None:
    away = engine(offload_optimizer="cpu", offload_param="cpu")
    assert away.persistent() == {"parameters": 0, "reduce buckets": 400}
    assert away.on_host() == {
        "parameters": 4 * 1024 / 4,
        "gradients": (4 + 4) * 250,
        "float32 masters": 4 * 250,
        "optimizer states": 8 * 250,
    }
    disk = engine(offload_optimizer="nvme", offload_param="nvme")
    assert disk.on_host() == {"gradients": 8 * 250}
    assert engine().on_host() == {}
    # A single rank gathers parameters from its host too.
    assert engine(world_size=1, offload_param="cpu").in_forward()["gathered parameters"] == 4 * 1024


def test_hpz_keeps_a_second_copy_per_node() -> None:
    assert engine(hpz=2).persistent()["hpZ copy of the parameters"] == 4 * 1024 / 2


def test_memory_per_rank_decreases_with_ranks() -> None:
    for stage in range(4):
        totals = [sum(engine(world_size, stage=stage).persistent().values()) for world_size in (2, 4, 8, 64, 1024)]
        assert totals == sorted(totals, reverse=True)


def test_defaults_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(stage=3), ZeroSettings(3, False, False)
    names = {
        "reduce_bucket": "reduce_bucket_size",
        "prefetch_bucket": "prefetch_bucket_size",
        "max_live": "max_live_parameters",
        "max_reuse": "max_reuse_distance",
        "sub_group": "sub_group_size",
        "allgather_bucket": "allgather_bucket_size",
        "hpz": "zero_hpz_partition_size",
    }
    assert {name: getattr(ours, name) for name in names} == {n: getattr(theirs, key) for n, key in names.items()}


def read(tmp_path: Path, **changes: Any) -> ZeroSettings:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(json.loads((CONFIGS / "base.json").read_text()) | changes))
    return load_engine_config(path).zero


def test_settings_are_read_from_an_engine_config(tmp_path: Path) -> None:
    base = read(tmp_path)
    assert (base.stage, base.autocast, base.bf16, base.overlap) == (3, True, False, True)
    assert (base.reduce_bucket, base.max_live) == (50_000_000, 3_000_000_000)
    assert base.leaves == ("Block", "ConvBlock")
    offloaded = load_engine_config(CONFIGS / "base-offload.json").zero
    assert (offloaded.offload_optimizer, offloaded.offload_param) == ("cpu", "cpu")
    one = read(tmp_path, zero_optimization={"stage": 1})
    assert (one.overlap, one.reduce_bucket) == (False, 500_000_000)
    types = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "torch_autocast": {}}
    half = read(tmp_path, **types)
    assert (half.autocast, half.bf16, half.param_bytes, half.accumulation_bytes) == (False, True, 2, 4)


class Derived(nn.Linear):
    """Subclass of Linear: DeepSpeed's rule applies to the exact class."""


def test_modules_communicated_in_bf16(tmp_path: Path) -> None:
    base = read(tmp_path)
    model = nn.Sequential(nn.Linear(2, 3), Derived(3, 5), nn.LayerNorm(5))
    counts = count_parameters(model, base, [1])
    assert counts.low == counts.trainable_low == 2 * 3 + 3
    assert counts.total == 9 + 20 + 10
    named = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": [f"{__name__}.Derived"]}
    assert count_parameters(model, read(tmp_path, torch_autocast=named), [1]).low == 3 * 5 + 5
    named["lower_precision_safe_modules"] = ["torch.nn.Lineal"]
    with pytest.raises(UserError, match=r"lower_precision_safe_modules: there is no class torch\.nn\.Lineal"):
        read(tmp_path, torch_autocast=named)
