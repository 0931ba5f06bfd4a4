"""Plans of the stage detect: memory, FLOPs and operators of a small detector, and the command on Table 2's recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mrmae_ds.cli.main import main
from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.detection.flops import detector_cost, loss_on_fixed_boxes, meta_detector
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.planning.activation_trace import CudaPolicy
from mrmae_ds.planning.fake_step import build_meta_task
from mrmae_ds.planning.operator_trace import ATTENTION
from mrmae_ds.planning.parameters import count_parameters
from mrmae_ds.planning.stage import CountedStage, count_stage, stage_memory
from mrmae_ds.planning.zero_memory import MASTERS, PARAMETERS, STATES, ZeroMemory
from tests.support.detectors import random_batch, small_detector

DETECTION = Path(__file__).resolve().parents[2] / "ds_configs" / "detection"
ENGINE = DETECTION / "mr_mae_base.json"
SMALL = ("model.arch=cvit_small", "model.overrides={depths: [1, 1, 5]}", "stages.detect.image_size=256")
SMALL += ("stages.detect.detector.global_blocks=[4]",)


def small_recipe(*more: str) -> Recipe:
    return load_recipe(DETECTION / "mr_mae_base.yaml", [*SMALL, *more])


def counted(recipe: Recipe, plan: CheckpointPlan | None = None) -> CountedStage:
    config = replace(load_engine_config(ENGINE), checkpointing=plan or CheckpointPlan())
    task = build_meta_task(recipe, "detect", config, 80)
    stage = recipe.stages.detect
    assert stage is not None
    return count_stage(task, config, detector_cost(meta_detector(recipe.model, stage, 80), stage, config.checkpointing))


@pytest.fixture(scope="module")
def small() -> CountedStage:
    return counted(small_recipe())


@pytest.mark.parametrize(("name", "parameters"), [("mr_mae_base", 109_704_629), ("mae_vit_base", 110_900_149)])
def test_parameters_gradients_and_states_are_exact(name: str, parameters: int) -> None:
    """Counts of the specification of Table 2's detectors; trained by AdamW in float32 on one rank and on eight."""
    config = load_engine_config(ENGINE)
    task = build_meta_task(load_recipe(DETECTION / f"{name}.yaml"), "detect", config, 80)
    groups = [sum(p.numel() for p in group["params"]) for group in task.param_groups()]
    counts = count_parameters(task.model, config.zero, groups)
    assert counts.total == counts.trainable == sum(counts.groups) == parameters
    for ranks in (1, 8):
        held = ZeroMemory(counts, config.zero, ranks).persistent()
        assert held == {PARAMETERS: 4 * parameters, MASTERS: 4 * parameters / ranks, STATES: 8 * parameters / ranks}


def test_the_trace_has_the_flops_of_the_count(small: CountedStage) -> None:
    """The count takes three forward passes; the first convolution computes no gradient of the images."""
    traced = small.timeline.operators.total_flops(1)
    assert traced == pytest.approx(small.cost.per_image, rel=0.02)


def test_memory_grows_by_images_and_shrinks_by_recomputation(small: CountedStage) -> None:
    sizes = [small.timeline.saved(images) for images in (1, 2, 4)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]))
    recomputed = counted(small_recipe(), CheckpointPlan(conv_stages=1, transformer=1))
    assert recomputed.timeline.saved(2) < small.timeline.saved(2)
    zero = load_engine_config(ENGINE).zero
    peaks = [stage_memory(stage, zero, 8, 2).peak.total for stage in (recomputed, small)]
    assert peaks[0] < peaks[1]


def test_boxes_bound_the_heads() -> None:
    """Memory that the heads save grows with the boxes, and is that of their convolutions to a tenth."""
    few, many = (counted(small_recipe(f"stages.detect.detector.boxes_per_image={n}")) for n in (128, 256))
    per_box = (many.timeline.saved(4) - few.timeline.saved(4)) / (4 * 128)
    # Four convolutions save their inputs in bf16, the norms theirs in float32, the ReLUs their outputs; a quarter of
    # the boxes has a mask, of four times the cells.
    assert per_box == pytest.approx(2 * 4 * (2 + 4 + 2) * 256 * 49, rel=0.1)


def test_attention_is_that_of_cuda(small: CountedStage) -> None:
    """Global attention materializes no map of all pairs of cells: under autocast, as on CUDA, it is folded."""
    cells, heads, wide = 4 * 14 * 14, 6, 96  # four windows; 64 channels, 14 rows and 14 columns, a multiple of eight
    operators = small.timeline.operators
    largest = max(operators.sizes[1][i] for i, kind in enumerate(operators.kinds) if kind == ATTENTION)
    # Backward reads queries, keys, values, the output and its gradient, and writes three gradients; a mask would add
    # heads * cells * cells elements.
    assert largest == pytest.approx(8 * 2 * cells * heads * wide, rel=0.02)
    with FakeTensorMode(), CudaPolicy():
        assert torch.empty(1).is_cuda


@pytest.mark.parametrize("boxes", [16, 512])
def test_the_loss_for_traces_reaches_every_parameter(boxes: int) -> None:
    detector = small_detector()
    detector.roi_heads.boxes_per_image = boxes
    images, *_ = random_batch((2, 1))
    loss_on_fixed_boxes(detector, images).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_pooling_by_known_levels_equals_pooling_by_area() -> None:
    detector = small_detector()
    levels = [torch.randn(1, 16, 32 >> i, 32 >> i) for i in range(4)]
    corner = torch.rand(40, 2) * 40
    boxes = torch.cat([corner, corner + torch.rand(40, 2) * 80 + 1], dim=1)
    pool = detector.roi_heads.box_roi_pool
    level_of = pool.level_of(boxes)
    rows = [torch.where(level_of == i)[0] for i in range(4)]
    rois = torch.cat([torch.zeros(40, 1), boxes], dim=1)
    assert torch.equal(pool.pool(levels, rois, rows), pool(levels, [boxes]))


Print = Callable[[], str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Print:
    return lambda: capsys.readouterr().out


def plan(*arguments: str) -> int:
    return main(["plan", "--ds_config", str(ENGINE), "--gpus", "8", "--gpu", "h100-80", *arguments, *SMALL])


def test_the_command_plans_a_detector(printed: Print) -> None:
    assert plan("--stage", "detect") == 0
    text = printed()
    assert "detect: 25 epochs at 256 pixels, batch 16 = micro-batch 2 x 8 GPUs x accumulation 1" in text
    assert "an epoch has 117,266 images" in text and "512 an image, 128 of them with an object; not counted" in text
    assert ".beton" not in text.split("assumptions")[0] and "cores at" not in text


def test_the_command_searches_an_engine_for_a_detector(printed: Print, tmp_path: Path) -> None:
    assert plan("--stage", "detect", "--search", "--write", str(tmp_path / "found.json")) == 0
    assert load_engine_config(tmp_path / "found.json").micro_batch in (1, 2)


def test_all_stages_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan() == 2
    assert "has the stage detect, whose engine is its own: pass --stage" in capsys.readouterr().err
