"""Resuming on another number of ranks: the next steps are exactly those of the original run.

Small linear models with gradients of exact halves, so that nothing rounds differently on one rank and on two.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrmae_ds.training.checkpoint.folder import list_checkpoints
from tests.support.ranks import run_in_group

pytestmark = pytest.mark.multi_process

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
REPAIRS = ("groups", "steps", "fixed")


def _engine(stage: int, more: dict[str, Any], world_size: int, fresh: bool) -> Any:
    """Two layers with a frozen parameter and a buffer, in three groups of different learning rate and decay.

    The frozen parameter is the moving average of a trained one.

    If not ``fresh``, everything is zero, so that a test sees what a load leaves out.
    """
    import deepspeed
    from torch import Tensor, nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(7, 9), nn.Linear(9, 5)
            self.fixed = nn.Parameter(torch.randn(9), requires_grad=False)
            self.register_buffer("kept", torch.randn(9))

        def forward(self, x: Tensor) -> Tensor:
            dtype = self.a.weight.dtype
            return self.b(torch.tanh(self.a(x.to(dtype))) * self.fixed + self.kept.to(dtype))

    model = Model()
    if not fresh:
        with torch.no_grad():
            for tensor in (*model.parameters(), model.kept):
                tensor.zero_()
    groups = [
        {"params": [model.a.weight, model.b.weight], "weight_decay": 0.05, "lr_scale": 1.0},
        {"params": [model.a.bias], "weight_decay": 0.0, "lr_scale": 0.5},
        {"params": [model.b.bias], "weight_decay": 0.2, "lr_scale": 0.25},
    ]
    zero = {"stage": stage, **more.get("zero", {})}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2 // world_size,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": zero,
        **({"zero_force_ds_cpu_optimizer": False} if "zero" in more else {}),
        **more.get("top", {}),
    }
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _train(engine: Any, first: int, count: int, world_size: int, rank: int) -> dict[str, Any]:
    """Take steps of two micro-batches each, on one rank or two; return the weights after them."""
    from torch import nn

    from mrmae_ds.models.moving_average import MovingAverage
    from mrmae_ds.training.engine.build import gather_state

    for step in range(first, first + count):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) * group["lr_scale"]
        for micro in range(2 // world_size):
            generator = torch.Generator().manual_seed(10 * step + micro * world_size + rank)
            loss = engine(torch.randn(4, 7, generator=generator)).float().square().mean()
            engine.backward(loss)
            engine.step()
        fixed, followed = (nn.ParameterList([p]) for p in (engine.module.fixed, engine.module.a.bias))
        MovingAverage.update(SimpleNamespace(network=fixed, decay=lambda _: 0.5), followed, 0.0)
    return gather_state(engine)


def _save(rank: int, world_size: int, stage: int, more: dict[str, Any], folder: Path) -> None:
    """Train, save after three steps, continue, and save the final weights."""
    from tests.support.engines import save

    engine = _engine(stage, more, world_size, fresh=True)
    _train(engine, 0, 3, world_size, rank)
    save(folder, 3, engine=engine)
    state = _train(engine, 3, 4, world_size, rank)
    if rank == 0:
        torch.save(state, folder / "expected.pt")


def _load(rank: int, world_size: int, stage: int, more: dict[str, Any], folder: Path) -> None:
    """Resume on another number of ranks; then again without each of the repairs."""
    from mrmae_ds.distributed.launch import Launch
    from mrmae_ds.training.checkpoint import universal
    from mrmae_ds.training.checkpoint.resume import load_checkpoint

    (checkpoint,) = list_checkpoints(folder)
    found = {}
    for left_out in ("", *(REPAIRS if more.get("repairs") else ())):
        engine = _engine(stage, more, world_size, fresh=False)
        plain = {name: getattr(universal, name) for name in ("_separate_steps", "_load_fixed", "_restore_groups")}
        name = {"": "", "groups": "_restore_groups", "steps": "_separate_steps", "fixed": "_load_fixed"}[left_out]
        if name:
            setattr(universal, name, lambda *_: None)
        load_checkpoint(engine, checkpoint, Launch(rank, rank, world_size, world_size), 4)
        for key, value in plain.items():
            setattr(universal, key, value)
        assert engine.global_steps == 3
        found[left_out] = _train(engine, 3, 4, world_size, rank)
    if rank == 0:
        torch.save(found, folder / "found.pt")


def _equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_resumes_two_ranks_on_one_with_all_repairs(tmp_path: Path) -> None:
    """The runs are equal, and differ if any of the repairs is left out."""
    run_in_group(_save, 2, 3, {}, tmp_path)
    run_in_group(_load, 1, 3, {"repairs": True}, tmp_path)
    expected, found = torch.load(tmp_path / "expected.pt"), torch.load(tmp_path / "found.pt")
    assert _equal(found.pop(""), expected)
    assert {name: _equal(state, expected) for name, state in found.items()} == dict.fromkeys(REPAIRS, False)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (0, {}),
        (1, {}),
        (1, {"top": BF16}),
        (2, {}),
        (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
        (3, {}),
        (3, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
        (3, {"zero": {"sub_group_size": 40}}),
    ],
)
def test_resumes_any_zero_stage(stage: int, more: dict[str, Any], sizes: tuple[int, int], tmp_path: Path) -> None:
    run_in_group(_save, sizes[0], stage, more, tmp_path)
    run_in_group(_load, sizes[1], stage, more, tmp_path)
    assert _equal(torch.load(tmp_path / "found.pt")[""], torch.load(tmp_path / "expected.pt"))


def test_converts_a_checkpoint_once(tmp_path: Path, alone: None, monkeypatch: Any) -> None:
    from mrmae_ds.training.checkpoint import universal
    from mrmae_ds.training.checkpoint.manifest import read_manifest
    from tests.support.engines import written

    made: list[Path] = []

    def work(checkpoint: Path, manifest: Any) -> None:
        made.append(checkpoint)
        folder = universal.universal_folder(checkpoint)
        folder.mkdir(exist_ok=True)
        (folder / "a").write_text("12345")
        (folder / universal.SOURCE).write_text(f'{{"id": "{manifest.id}", "files": {{"a": 5}}}}')

    monkeypatch.setattr(universal, "_convert", work)
    checkpoint = written(tmp_path, 5)
    manifest = read_manifest(checkpoint)
    for _ in range(2):
        assert universal.convert(checkpoint, manifest) == tmp_path / "checkpoints" / ".universal-step_000000005"
    assert len(made) == 1
    (universal.universal_folder(checkpoint) / "a").write_text("123")  # cut off
    universal.convert(checkpoint, manifest)
    assert len(made) == 2
    universal.convert(checkpoint, manifest.model_copy(update={"id": "another checkpoint of this name"}))
    assert len(made) == 3


@pytest.mark.usefixtures("alone")
def test_raises_a_failed_conversion_on_all_ranks(tmp_path: Path) -> None:
    from mrmae_ds.errors import CollectiveError
    from mrmae_ds.training.checkpoint import universal
    from mrmae_ds.training.checkpoint.manifest import read_manifest
    from tests.support.engines import written

    checkpoint = written(tmp_path, 5)  # its shards hold no state
    with pytest.raises(CollectiveError, match=rf"{checkpoint}: cannot be converted"):
        universal.convert(checkpoint, read_manifest(checkpoint))
    assert not universal.universal_folder(checkpoint).exists()
