"""Checks of single numbers on the CPU, and of the parity of a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.doctor.attention import check_attention
from mrmae_ds.doctor.context import DoctorContext, DoctorRequest
from mrmae_ds.doctor.kernels import check_convolution, check_launch
from mrmae_ds.doctor.numerics import check_parity
from mrmae_ds.doctor.ranks import RankStore
from mrmae_ds.doctor.reading import NotApplicable
from mrmae_ds.doctor.steps import check_memory, check_waits, engine_config
from mrmae_ds.doctor.tiny_job import tiny_job
from mrmae_ds.doctor.workload import noise_training
from mrmae_ds.profiling.step_ranges import start_ranges, stop_ranges

ALONE = Launch(0, 0, 1, 1)


@pytest.fixture
def context(tmp_path: Path) -> DoctorContext:
    request = DoctorRequest(out=tmp_path / "doctor.json", images=16)
    return DoctorContext(request, ALONE, torch.device("cpu"), None, RankStore(ALONE), tmp_path / "files")


def test_a_step_on_the_cpu_equals_itself(context: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DoctorContext, "require_cuda", lambda _: None)
    assert [(r.value, r.expected and r.expected.hard) for r in check_parity(context)] == [(0.0, True)] * 2
    assert (context.folder / "images.beton").is_file()


@pytest.mark.parametrize("check", [check_waits, check_memory, check_parity, check_convolution])
def test_checks_of_a_gpu_are_not_passed_in_silence(context: DoctorContext, check: object) -> None:
    with pytest.raises(NotApplicable, match="needs CUDA"):
        check(context)  # type: ignore[operator]


def test_steps_use_the_given_settings_of_their_stage(context: DoctorContext) -> None:
    given = Path("ds_configs/base-zero1.json")
    context.request = replace(context.request, ds_config=given)
    written = json.loads(given.read_text())
    zero1, zero3 = (engine_config(context, zero, 4).as_written() for zero in ("ZeRO-1", "ZeRO-3"))
    assert zero1["zero_optimization"] == written["zero_optimization"] and zero3["zero_optimization"]["stage"] == 3
    assert zero1["torch_autocast"] == zero3["torch_autocast"] == written["torch_autocast"]
    assert zero1["train_micro_batch_size_per_gpu"] == 4 and "activation_checkpointing" not in zero1


def test_an_operator_takes_some_microseconds(context: DoctorContext) -> None:
    (reading,) = check_launch(context)
    assert reading.unit == "us" and isinstance(reading.value, float) and 0 < reading.value < 1e6


@pytest.mark.slow
def test_attention_in_bf16_is_near_float32(context: DoctorContext) -> None:
    readings = check_attention(context)
    errors = [reading for reading in readings if reading.expected]
    assert len(errors) == 9 and all(reading.expected.contains(reading.value) for reading in errors)  # type: ignore


@pytest.mark.usefixtures("alone")
def test_the_reduction_is_a_range_of_each_backward_pass(
    context: DoctorContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = engine_config(context, "ZeRO-1", 4)
    with noise_training(tiny_job(context).load(), config, ALONE, torch.device("cpu"), accumulation=2) as training:
        start_ranges()
        with torch.profiler.profile() as profile:
            training.run()
        stop_ranges()
    names = [event.name for event in profile.events() if event.name in ("backward", "reduce")]
    assert names == ["backward", "reduce"] * 2
