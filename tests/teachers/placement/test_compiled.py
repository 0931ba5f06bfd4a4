"""Compiled teachers: blocks alone are compiled, and their targets are the eager ones within rounding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mrmae_ds.config.engine import EngineConfig, load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.errors import UserError
from mrmae_ds.teachers import Teacher, place_teacher
from mrmae_ds.training.tasks.build import build_task
from tests.support.placed import TEACHERS, clip_tower
from tests.support.sample_teachers import pixels_of

CPU = torch.device("cpu")
RECIPE = Path(__file__).resolve().parents[3] / "ds_configs/tiny.yaml"
# Of the largest value: compiled code adds up in another order, and rounds a block's bfloat16 values less often.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are handed to torch.compile, which does nothing."""
    modules: list[nn.Module] = []

    def compile(forward: Any, **options: Any) -> Any:
        assert options == {"dynamic": False, "fullgraph": True}
        modules.append(forward.__self__)
        return forward

    monkeypatch.setattr(torch, "compile", compile)
    return modules


def _engine(folder: Path, **keys: Any) -> EngineConfig:
    path = folder / "engine.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0, **keys}))
    return load_engine_config(path)


def _recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, list(overrides))


def _tower(*_: object) -> Teacher:
    return clip_tower()


@pytest.mark.parametrize("blocks", [True, False])
def test_training_compiles_the_blocks_of_teachers_on_request(
    blocks: bool, compiled: list[nn.Module], tmp_path: Path
) -> None:
    task = build_task(_recipe(), "pretrain", _engine(tmp_path, compile={"teachers": blocks}), 10, None, _tower)
    assert not compiled
    task.to(CPU)
    expected = [block for teacher in task.teachers.values() for block in teacher.network.transformer.resblocks]
    assert compiled == (expected if blocks else []) and len(expected) == 4


def test_a_placement_that_moves_weights_is_refused(tmp_path: Path) -> None:
    config = _engine(tmp_path, compile={"teachers": True})
    with pytest.raises(UserError, match=r"engine\.json: compile\.teachers needs .* is step; change the placement, or"):
        build_task(_recipe("stages.pretrain.placement=step"), "pretrain", config, 10, None, _tower)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", TEACHERS)
def test_targets_are_those_of_the_plain_teacher(name: str, tmp_path: Path) -> None:
    """Inductor compiles C++ for ten seconds to half a minute."""
    build = TEACHERS[name]
    plain, placed = build(tmp_path), place_teacher("one", build(tmp_path), PlacementConfig(), CPU, compiled=True)
    for seed in range(2):
        pixels = pixels_of(2, plain.image_size, seed)
        for found, expected in zip(placed(pixels)[:2], plain(pixels)[:2], strict=True):
            worst = (found - expected).abs().max() / expected.abs().max()
            assert worst <= TOLERANCE[plain.dtype], worst
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_fresh_compiler")
def test_quick_gelu_is_one_kernel() -> None:
    from open_clip.transformer import QuickGELU
    from torch._inductor import metrics

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    metrics.reset()
    with torch.no_grad():
        found = torch.compile(QuickGELU(), dynamic=False, fullgraph=True)(x)
    assert metrics.generated_kernel_count == 1
    exact = x.double() * torch.sigmoid(1.702 * x.double())
    assert (found.double() - exact).abs().max() <= (QuickGELU()(x).double() - exact).abs().max()
