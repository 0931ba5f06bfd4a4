"""``mrmae plan``: every recipe, monotonic properties, the numbers of its tables, errors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.planning import host
from mrmae_ds.planning.advice import advise, waits_for
from mrmae_ds.planning.cluster import Cluster
from mrmae_ds.planning.estimate import (
    CountedStage,
    Estimate,
    count_stage,
    estimate,
    largest_fitting,
    micro_batches,
    with_placement,
)
from mrmae_ds.planning.host import loader_cost, node_memory
from mrmae_ds.planning.plan import Request, make_cluster
from mrmae_ds.profiling.flops import recipe_cost
from mrmae_ds.profiling.gpus import Gpu, find_gpu

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
# CViT-Small with one block a stage: a moment's work.
SHORT = ("model.overrides={depths: [1, 1, 2]}", "model.decoder={depth: 2}")
SMALL = CONFIGS / "small.json"
ZERO = load_engine_config(SMALL).zero
CLUSTER = Cluster(find_gpu("h100-80"), gpus=16, per_node=8, network_gbs=50.0, sustained=300e12)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(CONFIGS / "small.yaml", list(SHORT))


@pytest.fixture(scope="module")
def stages(recipe: Recipe) -> dict[str, CountedStage]:
    config = load_engine_config(SMALL)
    costs = recipe_cost(recipe, config.checkpointing, 1000)
    return {cost.stage: count_stage(recipe, config, cost, 1000) for cost in costs}


def with_room(size: float) -> Cluster:
    """The cluster with cards on which tensors of so many bytes fit just so."""
    return replace(CLUSTER, gpu=Gpu("small", (), (size + 1) / 0.95 / 2**30 + 2, 100.0, 100.0, 32.0))


def total(estimate: Estimate) -> float:
    return estimate.fullest.total


def test_memory_grows_with_the_micro_batch_and_shrinks_with_the_stage(stages: dict[str, CountedStage]) -> None:
    for stage in stages.values():
        sizes = [total(estimate(stage, ZERO, CLUSTER, size)) for size in (2, 4, 8, 16, 32, 64)]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
        for low, high in ((1, 0), (3, 1)):
            settings = [replace(ZERO.at_stage(number), reduce_bucket=1000) for number in (low, high)]
            states = [sum(estimate(stage, zero, CLUSTER, 16).engine.standing().values()) for zero in settings]
            assert states[0] < states[1]


def test_a_step_is_computing_and_waiting(stages: dict[str, CountedStage]) -> None:
    now = estimate(stages["pretrain"], ZERO, CLUSTER, 16)
    assert now.engine.accumulation == 4 and now.batch == 1024
    computing = stages["pretrain"].cost.per_image * 64 / 300e12
    assert now.computing_s == pytest.approx(computing)
    # ZeRO-3 hides what it sends behind computing; the rest of it shows.
    sent = sum(flow.seconds for flow in now.flows)
    assert now.waiting_s == pytest.approx(max(sent - computing, 0))
    assert now.step_s is not None and now.images_per_s == pytest.approx(1024 / now.step_s)
    assert now.hours(1024 * 10 + 5, 3) == pytest.approx(30 * now.step_s / 3600)
    late = estimate(stages["pretrain"], ZERO.at_stage(1), CLUSTER, 16)
    assert late.waiting_s == pytest.approx(sum(flow.seconds for flow in late.flows))


def test_placements_of_a_teacher(stages: dict[str, CountedStage]) -> None:
    stage = stages["pretrain"]
    weights = stage.teachers["clip"]
    by_kind = {
        kind: estimate(stage, ZERO, CLUSTER, 16, with_placement(stage.placements, kind)).placed["clip"]
        for kind in ("device", "step", "stream", "sharded")
    }
    # ViT-B/16's tower in bf16: 86.19 M parameters, the projection among them, and statistics in float32.
    assert weights.total == pytest.approx(2 * 86.19e6, rel=1e-3)
    assert by_kind["device"].idle == by_kind["device"].calling == weights.total
    assert by_kind["step"].idle == by_kind["stream"].idle == 0
    # The projection is not used, all else is there in a call.
    assert 0.99 * weights.total < by_kind["step"].calling == by_kind["step"].copied <= weights.total
    # Two blocks of 7.09 M parameters, the embeddings, and no more.
    assert 2 * 2 * 7.09e6 <= by_kind["stream"].calling < 4 * 2 * 7.09e6
    assert by_kind["sharded"].idle == weights.total / 16
    assert by_kind["sharded"].gathered == weights.total


def test_the_largest_micro_batch_divides_the_batch_and_is_even_for_mixup(stages: dict[str, CountedStage]) -> None:
    assert micro_batches(stages["pretrain"], 16) == [1, 2, 4, 8, 16, 32, 64]
    assert micro_batches(stages["finetune"], 16) == [2, 4, 8, 16, 32, 64]
    assert micro_batches(stages["pretrain"], 3) == []
    best = largest_fitting(stages["finetune"], ZERO, CLUSTER)
    assert best is not None and best.micro_batch == 64
    # A card with room for micro-batch 8 and not for 16.
    small = with_room(total(estimate(stages["finetune"], ZERO, CLUSTER, 8)))
    best = largest_fitting(stages["finetune"], ZERO, small)
    assert best is not None and (best.micro_batch, best.fits, best.engine.accumulation) == (8, True, 8)
    assert largest_fitting(stages["finetune"], ZERO, with_room(1)) is None


def test_advice(stages: dict[str, CountedStage]) -> None:
    stage = stages["pretrain"]
    now = estimate(stage, ZERO, CLUSTER, 16)
    said = " ".join(advise(stage, now, ZERO, loader_rate=None))
    assert "train_micro_batch_size_per_gpu 64 fits too" in said and "accumulation follows: 1" in said
    assert "ZeRO-1 would fit" in said
    assert "recomputed" not in said
    assert now.images_per_s is not None
    assert f"the loader must deliver {now.images_per_s / 2:,.0f} images/s a node" in said
    assert waits_for(now, loader_rate=1.0).startswith("loader")
    assert waits_for(now, loader_rate=1e9) == waits_for(now, None)
    mean = replace(ZERO, max_live=0, max_reuse=0)
    said = " ".join(advise(stage, estimate(stage, mean, CLUSTER, 16), mean, None))
    assert "gathered 2.00 times" in said


def test_advice_where_much_is_recomputed_though_memory_is_free(recipe: Recipe) -> None:
    config = replace(load_engine_config(SMALL), checkpointing=CheckpointPlan(1, 1, 1))
    cost = recipe_cost(recipe, config.checkpointing, 1000)[1]
    stage = count_stage(recipe, config, cost, 1000)
    again = sum(part.recomputed for part in cost.parts.values()) / cost.per_image
    said = " ".join(advise(stage, estimate(stage, ZERO, CLUSTER, 16), ZERO, None))
    assert f"{again:.0%} of the operations are recomputed" in said


def test_advice_where_memory_is_short(stages: dict[str, CountedStage]) -> None:
    stage = stages["pretrain"]

    def said(cluster: Cluster) -> list[str]:
        return advise(stage, estimate(stage, ZERO, cluster, 16), ZERO, None)

    tight = with_room(total(estimate(stage, ZERO, CLUSTER, 8)))
    assert said(tight)[0].startswith("micro-batch 16 does not fit; train_micro_batch_size_per_gpu 8 does")
    assert any(sentence.startswith("placement: step frees 0.2") for sentence in said(tight))
    assert said(with_room(1))[0].startswith("not even micro-batch 1 fits; divide or offload")


def test_the_nodes_memory(recipe: Recipe, stages: dict[str, CountedStage]) -> None:
    now = estimate(stages["finetune"], ZERO, CLUSTER, 16)
    items = node_memory(recipe, stages["finetune"], now, 1000)
    image = 224 * 224 * 3
    assert items["batches decoded by FFCV (5 a process, pinned)"] == 8 * 5 * 16 * image
    assert items["batches being augmented (shared)"] == 8 * 3 * 16 * image
    assert list(items.values())[-1] == pytest.approx(1000 * 65e9 / 1_281_167)
    kinds = with_placement(stages["pretrain"].placements, "step")
    placed = estimate(stages["pretrain"], ZERO, CLUSTER, 16, kinds)
    there = node_memory(recipe, stages["pretrain"], placed, 1000)
    assert there["teachers' weights (pinned, each process its own)"] == 8 * placed.placed["clip"].host


def test_cores_come_from_a_measured_loader(tmp_path: Path, recipe: Recipe, stages: dict[str, CountedStage]) -> None:
    assert loader_cost(recipe, stages["pretrain"], tmp_path) is None
    (tmp_path / "loader_cpu.json").write_text(
        '{"settings": {"size": "224"}, "machine": {"cpu": "a CPU"}, "rounds": {"mrmae_ds, ffcv backend": '
        '[{"cpu_s_per_1000": 2.0}, {"cpu_s_per_1000": 4.0}, {"cpu_s_per_1000": 3.0}]}}'
    )
    cost = loader_cost(recipe, stages["pretrain"], tmp_path)
    assert cost is not None and (cost.cpu_s_per_1000, cost.size, cost.cpu) == (3.0, 224, "a CPU")
    # Fine-tuning augments, which that did not measure.
    assert loader_cost(recipe, stages["finetune"], tmp_path) is None


def plan(*arguments: str, config: str = "small") -> int:
    return main(["plan", "--ds_config", str(CONFIGS / f"{config}.json"), *arguments])


H100 = ("--gpus", "16", "--gpu", "h100-80")


def test_the_command(stages: dict[str, CountedStage], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*H100, "--tflops", "300", *SHORT) == 0
    out = capsys.readouterr().out
    assert "16 x h100-80 (2 nodes of 8); everything here is an estimate" in out
    for stage in stages.values():
        now = estimate(stage, ZERO, CLUSTER, 16)
        assert re.search(rf"^ +together +{total(now) / 2**30:.2f}  of 73\.3 usable: fits$", out, re.MULTILINE)
        assert now.step_s is not None and f"{now.images_per_s:,.0f} images/s" in out
        hours = now.hours(1_281_167, stage.config.epochs)
        assert (f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}") + " hours for the stage" in out
    assert re.search(r"^ +ZeRO-3 \(as configured\) ", out, re.MULTILINE)
    assert re.search(r"^ +stream +[\d.]+ +0\.00 ", out, re.MULTILINE)
    assert re.search(r"^ +1024 GPUs +the batch of 1,024: 1 a GPU, and mixup pairs images$", out, re.MULTILINE)
    assert out.count("advice") == 2 and "sustains 300 TFLOP/s" in out


def test_a_card_given_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpus", "8", "--memory", "24", "--stage", "finetune", *SHORT) == 0
    out = capsys.readouterr().out
    # Without a peak there are no times, and memory all the same.
    assert "of 20.9 usable" in out and "times are left out" in out and "images/s," not in out
    assert "pretrain:" not in out
    assert plan("--gpus", "8", "--memory", "24", "--peak", "165", "--stage", "finetune", *SHORT) == 0
    assert "hours for the stage" in capsys.readouterr().out


def test_what_a_gpu_sustains() -> None:
    def sustained(**options: Any) -> float | None:
        return make_cluster(Request(CONFIGS / "small.json", gpus=8, **options)).sustained

    assert sustained(gpu="h100-80") == pytest.approx(0.35 * 989.5e12)
    assert sustained(gpu="h100-80", mfu=0.5) == pytest.approx(0.5 * 989.5e12)
    assert sustained(gpu="h100-80", tflops=200) == 200e12
    assert sustained(gpu="v100-32") is None
    assert sustained(gpu="v100-32", tflops=30) == 30e12
    assert sustained(memory=24, peak=100) == pytest.approx(35e12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "8", "--gpu", "h300"), r"--gpu h300: not in the table, which has .*h200.*--memory"),
        (("--gpus", "8"), r"which GPU\? --gpu takes v100-16, .*--memory"),
        (("--gpus", "8", "--gpu", "v100-32", "--mfu", "0.3"), r"--mfu is a share of a peak that v100-32 has not"),
        (("--gpus", "12", "--gpu", "h200"), r"--gpus 12 are no whole number of nodes of 8; take 8 or 16"),
        ((*H100, "--micro-batch", "3"), r"batch_size 1024 is not a multiple of 48 .*nearest.*1008 or 1056"),
        ((*H100, "--micro-batch", "1"), r"mixup pairs the images of a micro-batch"),
        (("--gpus", "2048", "--gpu", "h200"), r"batch_size 1024 is not a multiple of 32768"),
        ((*H100, "--mfu", "1.2"), r"--mfu is a share of the peak"),
        ((*H100, "--mfu", "0.3", "--tflops", "200"), r"give one"),
        ((*H100, "--network", "0"), r"--network must be above 0"),
        ((*H100, "stages.finetune=null", "--stage", "finetune"), r"small has no stage finetune"),
        ((*H100, "stages.pretrain.placement=streams"), r"placement.*stream"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


ENGINES = sorted(path.stem for path in CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_config_has_a_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = "model.overrides={depths: [1, 1, 1]}"
    assert plan("--gpus", "2", "--gpu", "h100-80", "--stage", "finetune", one, config=name) == 0
    out = capsys.readouterr().out
    assert "together" in out and "advice" in out
    if name.endswith("-offload"):
        assert "offloaded to cpu" in out and "update by the host's processors" in out
        assert "with nothing offloaded it would fit" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENGINES if not name.startswith("tiny")])
def test_every_engine_config_has_a_plan_at_its_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpus", "64", "--gpu", "h100-80", config=name) == 0
    out = capsys.readouterr().out
    assert "usable: fits" in out and "DOES NOT FIT" not in out


def test_results_lie_where_benchmarks_write_them() -> None:
    assert host.RESULTS.is_dir()
