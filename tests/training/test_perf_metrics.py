"""Metrics of memory, traffic and utilization; collecting them never waits for the device within a step."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import MaskingConfig
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import encoder_spec
from mrmae_ds.teachers.base import Teacher, TeacherOutput, TeacherSpec
from mrmae_ds.training import perf_metrics as accounting
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.perf_metrics import PerfMeter, device_peak, peak_memory, utilization
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.pretrain import PretrainTask
from mrmae_ds.units import GIB
from tests.support.jobs import make_batch, pretrain_config

CPU = torch.device("cpu")


class Gathers:
    """Stand-in for the communication counter; the test sets its bytes."""

    def __init__(self) -> None:
        self.bytes, self.counting = 0, False

    def install(self, engine: Any) -> None:
        self.counting = True

    def close(self) -> None:
        self.counting = False


@pytest.fixture
def accountant(alone: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[PerfMeter]:
    monkeypatch.setattr(accounting, "GatherCounter", Gathers)
    yield PerfMeter(None, CPU)


def test_gathered_bytes_are_per_step_and_exclude_evaluations(accountant: PerfMeter) -> None:
    gathers = accountant._gathers
    gathers.bytes += 12 * GIB
    assert accountant.interval(4)["gather_gib"] == pytest.approx(3.0)
    gathers.bytes += 100 * GIB  # an evaluation
    accountant.restart()
    gathers.bytes += 5 * GIB
    assert accountant.interval(2)["gather_gib"] == pytest.approx(2.5)
    accountant.close()
    assert not gathers.counting


def test_peak_memory_includes_freed_memory(accountant: PerfMeter) -> None:
    before = peak_memory(CPU)
    held = torch.ones(before // 4 + 50 * 2**20 // 4)
    del held
    # As many bytes as the peak so far, and 50 MiB.
    assert peak_memory(CPU) > before + 40 * 2**20
    assert accountant.interval(1)["peak_memory_gib"] == pytest.approx(peak_memory(CPU) / GIB, rel=0.01)


def test_utilization_by_hand() -> None:
    """1,000 images/s at 64 GFLOP each on 8 devices are 8 TFLOP/s a device, a hundredth of 800."""
    assert utilization(1000, 64 * 10**9, 8, 800.0) == {"tflops": pytest.approx(8), "mfu": pytest.approx(0.01)}


def test_an_unknown_device_has_no_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mfu" not in utilization(1000, 64 * 10**9, 8, device_peak(CPU))
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 80GB HBM4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=round(79.2 * GIB))
        )
        assert device_peak(torch.device("cuda", 0)) == peak


class Syncs(TorchDispatchMode):
    """Records every operation that synchronizes the host with the device."""

    WAIT = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if str(function).startswith(self.WAIT):
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


class Colors(Teacher):
    """A teacher of 8x8 tokens, the mean colors of 4x4 cells."""

    def __init__(self) -> None:
        half = (0.5, 0.5, 0.5)
        spec = TeacherSpec(grid=(8, 8), width=3, image_size=32, mean=half, std=half, dtype=torch.float32, sha256="0")
        super().__init__(nn.Identity(), spec)

    def encode(self, images: torch.Tensor) -> TeacherOutput:
        tokens = nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return TeacherOutput(tokens, tokens.norm(dim=-1))


def test_pretraining_step_and_its_metrics_never_synchronize() -> None:
    spec = encoder_spec("cvit_tiny", {"dims": [8, 12, 16], "depths": [1, 1, 1], "num_heads": 2})
    mimic = {"target": "own", "tap": "encoder", "tokens": "visible", "normalize": "layer_norm", "weight": 0.5}
    pixels = {"target": "pixels", "tap": "decoder", "tokens": "masked", "normalize": "standardize", "weight": 0.5}
    masking = MaskingConfig(mode="sample", teacher="own")
    config = pretrain_config(teachers=("own",), masking=masking, objectives={"mimic": mimic, "pixels": pixels})
    model = PretrainModel(
        build_encoder(spec, 32),
        FusionSpec(stages=(1, 2)),
        DecoderSpec(dim=8, depth=1, num_heads=2),
        config.objectives,
        {"own": 3},
    )
    task = PretrainTask(model, {"own": Colors()}, config, DataConfig(train="train.beton", val="val.beton"))
    key, meter = MicroBatchKey(seed=1, step=2, index=0, rank=0, world_size=1, micro_batch=4), Meter()
    with Syncs() as syncs:
        losses = task.losses(model, make_batch(4), key)
        losses["loss"].backward()
        meter.add(losses)
    assert syncs.found == []
    with Syncs() as syncs:  # positive control: a synchronization is detected
        float(losses["loss"].detach())
    assert syncs.found
