"""Non-finite losses and gradients are detected and skipped under every allowed ZeRO stage and precision.

Each case is a DeepSpeed engine of one process.
"""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.training.engine.nonfinite import any_nonfinite, local_gradients
from mrmae_ds.training.step_sync import StepSync, take_step
from tests.support.jobs import make_batch

CPU = torch.device("cpu")
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
BF16_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}
UNCHECKED = {**BF16, "bf16": {"enabled": True, "check_grad_overflow": False}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = {
    "0": (0, {}, {}),
    "0-autocast": (0, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}),
    "1": (1, {}, {}),
    "1-bf16": (1, BF16, {}),
    "1-bf16-sums": (1, BF16_SUMS, {}),
    "1-offload": (1, {}, OFFLOAD),
    "2": (2, {}, {}),
    "2-bf16": (2, BF16, {}),
    "2-bf16-unchecked": (2, UNCHECKED, {}),
    "2-offload": (2, {}, OFFLOAD),
    "3": (3, {}, {}),
    "3-bf16": (3, BF16, {}),
    "3-offload": (3, {}, OFFLOAD),
}
BAD = ("loss", "gradient")


@pytest.fixture(scope="module", autouse=True)
def alone_with_deepspeed() -> Any:
    """A process group of one rank, initialized for DeepSpeed too."""
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    environment = pytest.MonkeyPatch()
    environment.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    yield
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    environment.undo()


class Model(nn.Module):
    """Two layers; on demand the gradient is NaN although the loss is finite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        colors = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1).to(self.first.weight.dtype)
        return self.second(torch.tanh(self.first(colors))).float().square().mean()


def _engine(stage: int, precision: dict[str, Any], zero: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": {"stage": stage, **zero},
        **({"zero_force_ds_cpu_optimizer": False} if zero else {}),
        **precision,
    }
    if stage == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    groups = [{"params": [p], "weight_decay": 0.1} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.05, fused=bool(zero))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _weights(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return [p.detach().clone() for p in parameters]


def _step(engine: deepspeed.DeepSpeedEngine, number: int, bad: str = "", guarded: bool = True) -> Any:
    """Run one step of two micro-batches, the first non-finite if ``bad`` names a value; return the reduced status."""
    step_sync = StepSync()
    step_sync.begin()
    for index in range(2):
        batch: Batch = make_batch(4, seed=2 * number + index)
        loss = engine(batch.images)
        if bad and index == 0:
            if bad == "loss":
                loss = loss + math.nan
            else:
                loss.register_hook(lambda gradient: gradient * math.inf)
        engine.backward(loss)
        step_sync.add(batch, {"loss": loss})
        if index == 0:
            engine.step()
    exchange = step_sync.exchange(engine)
    if guarded:
        return take_step(engine, exchange)
    engine.step()
    return exchange.read()


def _run(case: str, bad_at: dict[int, str], leave_out: bool = False) -> list[Tensor]:
    """Return the weights after four steps, of which some are non-finite or left out."""
    engine = _engine(*CASES[case])
    for number in range(4):
        bad = bad_at.get(number, "")
        if bad and leave_out:
            continue
        before = _weights(engine)
        status = _step(engine, number, bad)
        assert (status.bad_loss, status.bad_gradient) == (bad == "loss", bad == "gradient")
        after = _weights(engine)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == bool(bad), (number, bad)
    if not leave_out:
        assert (engine.global_steps, engine.micro_steps, engine.skipped_steps) == (4, 8, len(bad_at))
    return _weights(engine)


@pytest.mark.parametrize("case", CASES)
def test_skipped_step_changes_no_state(case: str) -> None:
    """Weights, optimizer states and gradients equal those of a run without the skipped step."""
    bad_at = {1: "loss", 2: "gradient"}
    skipped, never = _run(case, bad_at), _run(case, bad_at, leave_out=True)
    assert all(torch.equal(a, b) for a, b in zip(skipped, never, strict=True))


@pytest.mark.parametrize(("case", "bad"), [("0", "gradient"), ("2-bf16-unchecked", "gradient"), ("3", "loss")])
def test_unguarded_nonfinite_step_changes_the_weights(case: str, bad: str) -> None:
    """DeepSpeed alone applies these steps, so the guard is necessary."""
    engine = _engine(*CASES[case])
    _step(engine, 0)
    before = _weights(engine)
    _step(engine, 1, bad, guarded=False)
    assert not all(torch.equal(a, b) for a, b in zip(before, _weights(engine), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_checks_all_gradients(case: str) -> None:
    engine = _engine(*CASES[case])
    engine.backward(engine(make_batch(4).images))
    engine.step()
    engine.backward(engine(make_batch(4).images))
    total = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in engine.module.parameters())
    gradients = local_gradients(engine)
    if "offload" in case:
        assert len(gradients) == len(list(engine.module.parameters())) and all(norm > 0 for norm in gradients)
        total = 0
    assert sum(g.numel() for g in gradients) >= total
    assert sum(int(torch.count_nonzero(g)) for g in gradients) > 0.9 * total
    engine.step()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finds_one_value_among_many(value: float) -> None:
    tensors = [torch.ones(3), torch.ones(5, 7, dtype=torch.bfloat16), torch.empty(0), torch.full((2,), -1e30)]
    assert any_nonfinite(tensors, CPU) == 0
    tensors[1][2, 3] = value
    assert any_nonfinite(tensors, CPU) == 1
    assert any_nonfinite([], CPU) == 0
