"""FLOP counts against analytic formulas (two FLOPs per multiply-add) and against a real run."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mrmae_ds.cli.main import main
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.stages import TrainStageName
from mrmae_ds.errors import UserError
from mrmae_ds.factory import build_pretraining
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.layers import ConvBlock
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.planning.cost_report import cost_line, gpu_hours
from mrmae_ds.profiling.flops import COUNTED_STAGES, Flops, StageFlops, count_training, flop_counter, recipe_cost

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
NONE = CheckpointPlan()


def linear(rows: int, into: int, out: int) -> int:
    return 2 * rows * into * out


def conv_block(cells: int, dim: int, ratio: int = 4, mixed_cells: int | None = None) -> int:
    """FLOPs of two 1x1 convolutions and the MLP on ``cells``, the depth-wise 5x5 on ``mixed_cells``."""
    pointwise = 2 * linear(cells, dim, dim) + 2 * linear(cells, dim, ratio * dim)
    return pointwise + 2 * (mixed_cells or cells) * 25 * dim


def block(tokens: int, dim: int, ratio: int = 4) -> int:
    """FLOPs of qkv, scores, weighted sum, projection, MLP."""
    attention = linear(tokens, dim, 3 * dim) + 2 * 2 * tokens * tokens * dim + linear(tokens, dim, dim)
    return attention + 2 * linear(tokens, dim, ratio * dim)


def counted(module: nn.Module, *shape: int) -> Flops:
    module = module.to("meta")
    x = torch.empty(*shape, device="meta", requires_grad=True)
    return count_training(lambda: module(x), lambda plan: None, NONE)


def test_flops_of_a_convolution_block_equal_its_formula() -> None:
    flops = counted(ConvBlock(8, 4), 1, 6, 6, 8)
    assert flops.forward == conv_block(36, 8)
    assert flops.backward == 2 * flops.forward
    assert flops.recomputed == 0


def test_flops_of_an_attention_block_equal_their_formula() -> None:
    flops = counted(Block(24, 3, qkv_bias=True), 1, 10, 24)
    assert flops.forward == block(10, 24)
    assert flops.backward == 2 * flops.forward


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_backward_of_grouped_convolution(groups: int) -> None:
    flops = counted(nn.Conv2d(4, 8, 3, padding=1, groups=groups), 1, 4, 5, 5)
    assert flops.forward == 2 * 25 * 9 * 8 * 4 // groups
    assert flops.backward == 2 * flops.forward


def test_backward_skips_inputs_without_gradient() -> None:
    images = torch.empty(1, 4, 5, 5, device="meta")
    conv = nn.Conv2d(4, 8, 3, padding=1, device="meta")
    flops = count_training(lambda: conv(images), lambda plan: None, NONE)
    assert flops.backward == flops.forward


# CViT-Small with one convolution block per stage, so that counting is fast: cells of 56x56, 28x28 and 14x14;
# widths 128, 256, 384.
SHORT = ("model.overrides={depths: [1, 1, 2]}", "model.decoder={depth: 2}")
SHORT_VIT = ("model.overrides={depth: 3}", "model.decoder={depth: 1}")
PATCHES = [linear(3136, 48, 128), linear(784, 4 * 128, 256), linear(196, 4 * 256, 384) + linear(196, 384, 384)]


def cost(name: str, *overrides: str, plan: CheckpointPlan = NONE) -> list[StageFlops]:
    return recipe_cost(load_recipe(CONFIGS / f"{name}.yaml", list(overrides)), plan)


@pytest.fixture(scope="module")
def short() -> list[StageFlops]:
    return cost("small", *SHORT)


def test_flops_of_finetuning_are_its_layers_forward_and_backward(short: list[StageFlops]) -> None:
    (flops,) = short[1].parts.values()
    blocks = conv_block(3136, 128) + conv_block(784, 256) + 2 * block(196, 384)
    assert flops.forward == sum(PATCHES) + blocks + linear(1, 384, 1000)
    # The images need no gradient.
    assert flops.backward == 2 * flops.forward - PATCHES[0]
    assert flops.recomputed == 0


def test_pretraining_computes_visible_tokens_only(short: list[StageFlops]) -> None:
    parts = short[0].parts
    assert list(parts) == ["encoder", "decoder, heads", "teacher clip"]
    conv = conv_block(784, 128, mixed_cells=3136) + conv_block(196, 256, mixed_cells=784)
    fusion = linear(49, 16 * 128, 384) + linear(49, 4 * 256, 384)
    encoder = parts["encoder"]
    assert encoder.forward == sum(PATCHES) // 4 + conv + 2 * block(49, 384) + fusion
    assert encoder.backward == 2 * encoder.forward - PATCHES[0] // 4
    decoder = linear(49, 384, 512) + 2 * block(196, 512) + linear(196, 512, 768) + linear(49, 384, 768)
    assert parts["decoder, heads"] == Flops(decoder, 2 * decoder)


def test_teacher_processes_all_tokens_without_backward(short: list[StageFlops]) -> None:
    # ViT-B/16: 197 tokens; in addition to its blocks, one query of the class token and all keys are computed once more.
    importance = linear(1, 768, 768) + linear(197, 768, 768) + 2 * 197 * 768
    expected = Flops(linear(196, 768, 768) + 12 * block(197, 768) + importance)
    assert short[0].parts["teacher clip"] == expected
    joint = cost("ablations/table4_joint", *SHORT, "stages.finetune=null")[0].parts
    assert list(joint) == ["encoder", "decoder, heads", "teacher clip", "teacher dino"]
    assert joint["teacher clip"] == joint["teacher dino"] == expected


def test_a_moving_average_processes_all_tokens_without_backward(short: list[StageFlops]) -> None:
    average = "teachers={clip: null, ema: {kind: ema, decay: 0.9}}"
    own = ("stages.pretrain={teachers: [ema], masking: null, objectives: {mimic: {target: ema}}}",)
    parts = cost("small", *SHORT, average, *own, "stages.finetune=null")[0].parts
    conv = conv_block(3136, 128, mixed_cells=3136) + conv_block(784, 256, mixed_cells=784)
    assert parts["teacher ema"] == Flops(sum(PATCHES) + conv + 2 * block(196, 384))
    assert parts["encoder"] == short[0].parts["encoder"]


# Recomputation of the convolution stages. Backward does not need a block's last product, unless drop path follows it;
# in fine-tuning the first block has no drop path.
CONV_RECOMPUTED = (
    conv_block(784, 128, mixed_cells=3136)
    - linear(784, 4 * 128, 128)
    + conv_block(196, 256, mixed_cells=784)
    - linear(196, 4 * 256, 256)
)
DENSE_RECOMPUTED = conv_block(3136, 128) - linear(3136, 4 * 128, 128) + conv_block(784, 256)


def test_recomputation_skips_the_last_product_of_a_block(short: list[StageFlops]) -> None:
    checkpointed = cost("small", *SHORT, plan=CheckpointPlan(conv_stages=1, transformer=1, decoder=1))
    encoder, decoder, _ = checkpointed[0].parts.values()
    plain = short[0].parts["encoder"]
    assert (encoder.forward, encoder.backward) == (plain.forward, plain.backward)
    assert encoder.recomputed == CONV_RECOMPUTED + 2 * (block(49, 384) - linear(49, 4 * 384, 384))
    assert decoder.recomputed == 2 * (block(196, 512) - linear(196, 4 * 512, 512))
    (classifier,) = checkpointed[1].parts.values()
    assert classifier.recomputed == DENSE_RECOMPUTED + 2 * block(196, 384)


def test_only_planned_blocks_are_recomputed() -> None:
    plan = CheckpointPlan(transformer=2)
    encoder, decoder, _ = cost("small", *SHORT, "stages.finetune=null", plan=plan)[0].parts.values()
    assert encoder.recomputed == block(49, 384) - linear(49, 4 * 384, 384)
    assert decoder.recomputed == 0


def test_no_decoder_without_pixel_objective() -> None:
    overrides = ("model.overrides={depth: 3}", "model.fusion.blocks=[1]", "stages.finetune=null")
    parts = cost("ablations/table3_6_mimic_only", *overrides)[0].parts
    assert list(parts) == ["encoder", "heads", "teacher clip"]
    assert parts["heads"] == Flops(linear(49, 768, 768), 2 * linear(49, 768, 768))


def test_plain_vit_embeds_all_patches_and_encodes_visible_ones() -> None:
    parts = cost("baselines/mae_small", *SHORT_VIT, "stages.finetune=null")[0].parts
    assert list(parts) == ["encoder", "decoder, heads"]
    patches = linear(196, 768, 384)
    assert parts["encoder"].forward == patches + 3 * block(50, 384)
    assert parts["encoder"].backward == 2 * parts["encoder"].forward - patches


def test_finetuning_at_its_own_image_size() -> None:
    (large,) = cost("huge448", SHORT[0])
    assert (large.stage, large.epochs) == ("finetune", 50)
    (flops,) = large.parts.values()
    patches = [linear(4096, 147, 768), linear(4096, 768, 1024), linear(1024, 4 * 1024, 1280), linear(1024, 1280, 1280)]
    blocks = conv_block(4096, 768) + conv_block(4096, 1024) + 2 * block(1024, 1280)
    assert flops.forward == sum(patches) + blocks + linear(1, 1280, 1000)


def test_totals_and_gpu_hours_equal_a_count_by_hand() -> None:
    costs = [
        StageFlops("pretrain", 200, {"a": Flops(10**9, 2 * 10**9, 10**9), "b": Flops(10**9)}),
        StageFlops("finetune", 3, {"c": Flops(10**9, 2 * 10**9)}),
    ]
    assert [c.per_image for c in costs] == [5 * 10**9, 3 * 10**9]
    assert [c.total(1_000_000) for c in costs] == [10**18, 9 * 10**15]
    # 1.009e18 FLOPs at 100e12 FLOP/s take 10,090 s.
    assert gpu_hours(costs, 1_000_000, 100) == pytest.approx(10_090 / 3600)
    line = cost_line(costs, 1_000_000, 100)
    assert line == "1.00 + 0.00900 exaFLOP (pretrain + finetune), 2.80 GPU-hours at an assumed 100 TFLOP/s"
    assert "2,800 GPU-hours" in cost_line(costs, 1_000_000, 0.1)


def test_recipe_without_training_stage_is_refused() -> None:
    with pytest.raises(UserError, match="small has no training stage that can be counted"):
        cost("small", "stages.pretrain=null", "stages.finetune=null")


@pytest.mark.parametrize("only", COUNTED_STAGES)
def test_counts_one_stage_alone(only: TrainStageName) -> None:
    recipe = load_recipe(CONFIGS / "baselines/mae_tiny.yaml")
    (alone,) = recipe_cost(recipe, NONE, 10, only=only)
    assert alone == next(cost for cost in recipe_cost(recipe, NONE, 10) if cost.stage == only)


def test_stage_that_is_not_counted_is_refused() -> None:
    recipe = load_recipe(CONFIGS / "baselines/mae_tiny.yaml")
    with pytest.raises(UserError, match="has no probe stage that can be counted"):
        recipe_cost(recipe, NONE, 10, only="probe")


def test_teacher_grid_mismatch_is_refused() -> None:
    with pytest.raises(UserError, match=r"teachers\.clip: its 14x14 tokens .* set teachers\.clip\.image_size to 256"):
        cost("huge", "teachers.clip.source=ViT-B-16-quickgelu")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{source: ViT-B-61}", r"teachers\.clip\.source: open_clip has no model 'ViT-B-61'"),
        ("{source: RN50}", r"teachers\.clip\.source: .* is not a ViT"),
        ("{kind: timm, source: vit_bas, weights: null}", r"teachers\.clip\.source: timm model 'vit_bas'"),
        ("{kind: checkpoint, source: runs/none, weights: null}", r"teachers\.clip\.source: runs/none "),
    ],
)
def test_unknown_teacher_is_refused(teacher: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cost("small", f"teachers.clip={teacher}")


def _command(*arguments: str, config: Path = CONFIGS / "small.json") -> int:
    return main(["cost", "--ds_config", str(config), *arguments])


def test_command_prints_the_cost_of_each_stage(
    short: list[StageFlops], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((CONFIGS / "small.json").read_text())
    recomputing = tmp_path / "small.json"
    recomputing.write_text(json.dumps(config | {"activation_checkpointing": {"conv_stages": "all"}}))
    recipe = ("--recipe", str(CONFIGS / "small.yaml"))
    options = ("--num-images", "1000", "--tflops", "100", "--gpus", "8")
    assert _command(*recipe, *options, *SHORT, config=recomputing) == 0
    out = capsys.readouterr().out
    recomputed = {"encoder": CONV_RECOMPUTED, "classifier": DENSE_RECOMPUTED}
    costs = [
        replace(stage, parts={n: replace(part, recomputed=recomputed.get(n, 0)) for n, part in stage.parts.items()})
        for stage in short
    ]
    for stage in costs:
        for name, part in stage.parts.items():
            numbers = (part.forward, part.backward, part.recomputed, part.total)
            shown = r"\s+".join(re.escape(f"{number / 1e9:.2f}") for number in numbers)
            assert re.search(rf"^{stage.stage}: {name}\s+{shown}$", out, re.MULTILINE)
    assert cost_line(costs, 1000, 100) in out
    assert f"{gpu_hours(costs, 1000, 100) / 8:.3g} hours on 8 GPUs" in out


def test_command_accepts_recipe_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(CONFIGS / "baselines/mae_small.yaml")
    assert _command("--recipe", recipe, "stages.pretrain=null", SHORT_VIT[0]) == 0
    out = capsys.readouterr().out
    assert "classifier" in out and "encoder" not in out and "hours" not in out
    assert "1,281,167 images" in out


@pytest.mark.parametrize("arguments", [["--gpus", "8"], ["--tflops", "0"], ["--tflops", "-3"], ["--num-images", "0"]])
def test_invalid_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {arguments[0]}") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["baselines/mae_tiny", "baselines/mcmae_tiny"])
def test_counts_equal_those_of_a_real_run(name: str) -> None:
    """Run two images on the CPU with real weights, outside the meta device, under torch's counter."""
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    pretrain, finetune = recipe_cost(recipe, NONE, 10)
    stage, tuning = recipe.stages.pretrain, recipe.stages.finetune
    assert stage is not None and tuning is not None
    model, _ = build_pretraining(recipe, stage)
    size = recipe.model.image_size
    images = torch.rand(2, 3, size, size)
    visible = choose_visible(torch.rand(2, math.prod(model.encoder.grid)), model.encoder.grid, stage.masking.keep_ratio)
    # Torch's counter has no formula for the fused attention kernels of the CPU.
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, visible, {})["loss"].backward()
    assert counter.get_total_flops() == 2 * pretrain.per_image
    classifier = build_encoder(recipe.model.spec(), tuning.image_size or size, 10, tuning.drop_path)
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        classifier(images).sum().backward()
    assert counter.get_total_flops() == 2 * finetune.per_image
