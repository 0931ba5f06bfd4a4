"""``mrmae plan``: all engine configs, monotonic properties, the numbers in its tables, errors."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.sections import LoaderConfig
from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.planning.estimates import host
from mrmae_ds.planning.estimates.advice import advise
from mrmae_ds.planning.estimates.cluster import Cluster
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.host import loader_cost, node_memory
from mrmae_ds.planning.estimates.scale import bottleneck
from mrmae_ds.planning.estimates.step import StepEstimate, estimate_step, largest_fitting
from mrmae_ds.planning.fake_step import build_meta_task
from mrmae_ds.planning.plan import PlanRequest, describe_plan, make_cluster
from mrmae_ds.planning.stage import CountedStage, count_stage, stage_memory, with_placement
from mrmae_ds.profiling.flops import recipe_cost
from mrmae_ds.profiling.gpus import Gpu, find_gpu
from mrmae_ds.profiling.measured_node import MeasuredNode
from tests.support.record_runs import make_recipe, save_pretraining

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
# CViT-Small with one block per stage, which is fast to trace.
SHORT = ("model.overrides={depths: [1, 1, 2]}", "model.decoder={depth: 2}")
SMALL = CONFIGS / "small.json"
ZERO = load_engine_config(SMALL).zero
CLUSTER = Cluster(find_gpu("h100-80"), gpus=16, gpus_per_node=8, network_gbs=50.0, sustained=300e12)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(CONFIGS / "small.yaml", list(SHORT))


@pytest.fixture(scope="module")
def stages(recipe: Recipe) -> dict[str, CountedStage]:
    config = load_engine_config(SMALL)
    costs = recipe_cost(recipe, config.checkpointing, 1000)
    return {cost.stage: count_stage(build_meta_task(recipe, cost.stage, config, 1000), config, cost) for cost in costs}


FIXED = {"vit_tiny": ("encoder.pos_embed", "decoder.pos_embed"), "beit_tiny": ()}
METHODS = sorted((CONFIGS / "methods").glob("*_tiny.yaml"))


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_every_method_is_planned(file: Path, tmp_path: Path) -> None:
    """Memory and time of a step; of the parameters, fixed positions and data2vec's average are not trained."""
    save_pretraining(tmp_path, make_recipe(tmp_path, "MAE", {"arch": "vit_tiny"}, 32, None))
    with_teacher = "mae" in load_recipe(file).teachers
    recipe = load_recipe(file, [f"teachers.mae.source={tmp_path / 'pretrain'}"] if with_teacher else [])
    config = load_engine_config(CONFIGS / "tiny.json")
    (cost,) = recipe_cost(recipe, config.checkpointing, only="pretrain")
    stage = count_stage(build_meta_task(recipe, "pretrain", config, 10), config, cost)
    step = estimate_step(stage, config.zero, CLUSTER, 2)
    assert total(step) > 0 and step.compute is not None and set(stage.teachers) == set(recipe.teachers) - {"ema"}
    counts = stage.count_parameters(config.zero)
    frozen = counts.encoder if "ema" in recipe.teachers else 0  # the average
    frozen += sum(p.numel() for name, p in stage.task.model.named_parameters() if name in FIXED[recipe.model.arch])
    if recipe.model.overrides:
        frozen = 0  # learned positions, without a decoder
    norm = 2 * 96 if recipe.method == "MaskAlign" else 0  # behind the last block, where no loss is tapped
    assert counts.frozen == frozen + norm and counts.trainable == sum(stage.groups)


def with_room(size: float) -> Cluster:
    """Return the cluster with GPUs whose usable memory is just above ``size`` bytes."""
    return replace(CLUSTER, gpu=Gpu("small", (), (size + 1) / 0.95 / 2**30 + 2, 100.0, 100.0, 32.0))


def total(step: StepEstimate) -> float:
    return step.memory.peak.total


def test_memory_grows_with_micro_batch_and_shrinks_with_zero_stage(stages: dict[str, CountedStage]) -> None:
    for stage in stages.values():
        sizes = [total(estimate_step(stage, ZERO, CLUSTER, size)) for size in (2, 4, 8, 16, 32, 64)]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
        for low, high in ((1, 0), (3, 1)):
            settings = [replace(ZERO.at_stage(number), reduce_bucket=1000) for number in (low, high)]
            states = [sum(stage_memory(stage, zero, 16, 16).zero.persistent().values()) for zero in settings]
            assert states[0] < states[1]


def test_step_is_micro_batches_update_and_waiting(stages: dict[str, CountedStage]) -> None:
    stage = stages["pretrain"]
    step = estimate_step(stage, ZERO, CLUSTER, 16)
    assert step.memory.zero.accumulation == 4 and step.memory.batch == 1024 and step.compute is not None
    computing = stage.cost.per_image * 16 / 300e12
    assert step.compute.gpu_s == pytest.approx(computing)
    tensors = sum(1 for _ in stage.task.model.parameters())
    operators_s = len(stage.timeline.operators) * CONSTANTS.op_s
    first_s, host_s = (
        operators_s + tensors * each for each in (CONSTANTS.zero3_first_param_s, CONSTANTS.zero3_param_s)
    )
    assert step.compute.first_host_s == pytest.approx(first_s)
    assert step.compute.host_s == pytest.approx(host_s) and first_s > host_s > computing
    assert step.compute.mean_host_s == pytest.approx((first_s + 3 * host_s) / 4)
    total_s = first_s + 3 * host_s + tensors * CONSTANTS.update_param_s
    assert step.compute.total_s == pytest.approx(total_s)
    # ZeRO-3 overlaps communication with computation; the excess is waiting time.
    sent = sum(transfer.seconds for transfer in step.transfers)
    assert step.waiting_s == pytest.approx(max(sent - total_s, 0))
    assert step.step_s is not None and step.images_per_s == pytest.approx(1024 / step.step_s)
    assert step.hours(1024 * 10 + 5, 3) == pytest.approx(30 * step.step_s / 3600)
    zero1 = estimate_step(stage, replace(ZERO.at_stage(1), overlap=False), CLUSTER, 16)
    assert zero1.waiting_s == pytest.approx(sum(transfer.seconds for transfer in zero1.transfers))


def test_operators_have_the_flops_of_torchs_counter(stages: dict[str, CountedStage]) -> None:
    for stage in stages.values():
        # The counter's attention is not fused; a fused backward computes the scores once more.
        assert stage.cost.per_image <= stage.timeline.operators.total_flops(1) < 1.02 * stage.cost.per_image


def test_a_fast_host_leaves_the_gpu_as_limit(stages: dict[str, CountedStage]) -> None:
    fast = MeasuredNode(op_us=0.1, zero1_param_us=0, zero3_first_param_us=0, zero3_param_us=0, update_param_us=0.001)
    step = estimate_step(stages["pretrain"], ZERO, replace(CLUSTER, measured=fast), 64)
    assert step.compute is not None and not step.compute.waits_for_host
    assert step.compute.micro_batches_s == step.compute.accumulation * step.compute.gpu_s


def test_zero3_loses_on_the_host_at_small_micro_batches(stages: dict[str, CountedStage]) -> None:
    """The wire favors ZeRO-3, whose communication overlaps; the host's work per parameter decides."""
    one, three = (estimate_step(stages["pretrain"], ZERO.at_stage(number), CLUSTER, 4) for number in (1, 3))
    assert one.waiting_s is not None and three.waiting_s is not None and one.waiting_s > three.waiting_s
    assert one.step_s is not None and three.step_s is not None and one.step_s < three.step_s


def test_zero3_fetches_in_every_micro_batch_unless_it_keeps_parameters(stages: dict[str, CountedStage]) -> None:
    kept, fetched = (
        estimate_step(stages["pretrain"], replace(ZERO, max_live=live), CLUSTER, 16).compute for live in (10**10, 0)
    )
    assert kept is not None and fetched is not None and kept.accumulation == 4
    assert kept.host_s < kept.first_host_s == fetched.first_host_s == fetched.host_s


def test_more_gpus_do_not_shorten_a_step_below_the_host(stages: dict[str, CountedStage]) -> None:
    step = estimate_step(stages["pretrain"], ZERO.at_stage(1), CLUSTER.with_gpus(1024), 1)
    host_s = len(stages["pretrain"].timeline.operators) * CONSTANTS.op_s
    assert step.step_s is not None and step.step_s > host_s and bottleneck(step).startswith("launches")


def test_overlapped_reduction_of_zero1_is_hidden_by_one_backward(stages: dict[str, CountedStage]) -> None:
    slow, zero = replace(CLUSTER, network_gbs=0.01), ZERO.at_stage(1)
    exposed = estimate_step(stages["pretrain"], replace(zero, overlap=False), slow, 16)
    overlapped = estimate_step(stages["pretrain"], zero, slow, 16)
    assert exposed.waiting_s is not None and overlapped.waiting_s is not None and exposed.compute is not None
    backward = sum(part.backward + part.recomputed for part in stages["pretrain"].cost.parts.values())
    share = backward / stages["pretrain"].cost.per_image
    assert exposed.waiting_s - overlapped.waiting_s == pytest.approx(share * exposed.compute.first_host_s)


def test_a_slow_loader_limits_the_step(stages: dict[str, CountedStage]) -> None:
    step = estimate_step(stages["pretrain"], ZERO, replace(CLUSTER, node_loader=1.0), 16)
    assert step.step_s == 512 and step.images_per_s == 2.0
    assert bottleneck(step).startswith("loader") and step.node_demand is not None and step.node_demand > 1
    assert any("so it is the bottleneck" in sentence for sentence in advise(stages["pretrain"], step, ZERO))


def test_teacher_memory_while_idle_and_calling_depends_on_the_placement(stages: dict[str, CountedStage]) -> None:
    stage = stages["pretrain"]
    weights = stage.teachers["clip"]
    by_kind = {
        kind: stage_memory(stage, ZERO, 16, 16, with_placement(stage.task.placements, kind)).teachers["clip"]
        for kind in ("device", "step", "stream", "sharded")
    }
    # ViT-B/16's image tower in bf16: 86.19 M parameters, including the projection, and statistics in float32.
    assert weights.total == pytest.approx(2 * 86.19e6, rel=1e-3)
    assert by_kind["device"].idle == by_kind["device"].calling == weights.total
    assert by_kind["step"].idle == by_kind["stream"].idle == 0
    # All weights except the unused projection are on the device during a call.
    assert 0.99 * weights.total < by_kind["step"].calling == by_kind["step"].copied <= weights.total
    # Two blocks of 7.09 M parameters and the embeddings.
    assert 2 * 2 * 7.09e6 <= by_kind["stream"].calling < 4 * 2 * 7.09e6
    assert by_kind["sharded"].idle == weights.total / 16
    assert by_kind["sharded"].gathered == weights.total


def test_micro_batches_divide_the_batch_and_are_even_for_mixup(stages: dict[str, CountedStage]) -> None:
    assert stages["pretrain"].micro_batches(16) == [1, 2, 4, 8, 16, 32, 64]
    assert stages["finetune"].micro_batches(16) == [2, 4, 8, 16, 32, 64]
    assert stages["pretrain"].micro_batches(3) == []
    best = largest_fitting(stages["finetune"], ZERO, CLUSTER)
    assert best is not None and best.memory.micro_batch == 64
    # Memory for micro-batch 8 but not for 16.
    small = with_room(total(estimate_step(stages["finetune"], ZERO, CLUSTER, 8)))
    best = largest_fitting(stages["finetune"], ZERO, small)
    assert best is not None and (best.memory.micro_batch, best.fits, best.memory.zero.accumulation) == (8, True, 8)
    assert largest_fitting(stages["finetune"], ZERO, with_room(1)) is None


def test_advice_names_the_changes_that_would_raise_throughput(stages: dict[str, CountedStage]) -> None:
    stage = stages["pretrain"]
    step = estimate_step(stage, ZERO, CLUSTER, 16)
    advice = " ".join(advise(stage, step, ZERO))
    assert "train_micro_batch_size_per_gpu 64 fits too" in advice and "accumulation becomes 1" in advice
    assert "ZeRO-1 would fit" in advice
    assert "recomputed" not in advice
    assert "times as fast" in advice and "the GPU waits for the host, which issues" in advice
    assert step.images_per_s is not None
    assert f"the loader must deliver {step.images_per_s / 2:,.0f} images/s per node" in advice
    mean = replace(ZERO, max_live=0, max_reuse=0)
    advice = " ".join(advise(stage, estimate_step(stage, mean, CLUSTER, 16), mean))
    assert "gathered 2.00 times" in advice


def test_advice_against_needless_recomputation(recipe: Recipe) -> None:
    config = replace(load_engine_config(SMALL), checkpointing=CheckpointPlan(1, 1, 1))
    cost = recipe_cost(recipe, config.checkpointing, 1000)[1]
    stage = count_stage(build_meta_task(recipe, cost.stage, config, 1000), config, cost)
    again = sum(part.recomputed for part in cost.parts.values()) / cost.per_image
    advice = " ".join(advise(stage, estimate_step(stage, ZERO, CLUSTER, 16), ZERO))
    assert f"{again:.0%} of the operations are recomputed" in advice


def test_advice_for_insufficient_memory(stages: dict[str, CountedStage]) -> None:
    stage = stages["pretrain"]

    def advice(cluster: Cluster) -> list[str]:
        return advise(stage, estimate_step(stage, ZERO, cluster, 16), ZERO)

    tight = with_room(total(estimate_step(stage, ZERO, CLUSTER, 8)))
    assert advice(tight)[0].startswith("micro-batch 16 does not fit; train_micro_batch_size_per_gpu 8 does")
    assert any(sentence.startswith("placement: step frees 0.2") for sentence in advice(tight))
    assert advice(with_room(1))[0].startswith("micro-batch 1 does not fit either; partition or offload")


def test_host_memory_of_a_node(recipe: Recipe, stages: dict[str, CountedStage]) -> None:
    step = estimate_step(stages["finetune"], ZERO, CLUSTER, 16)
    items = node_memory(recipe, stages["finetune"], step, 1000)
    image = 224 * 224 * 3
    assert items["batches decoded by FFCV (5 per rank, pinned)"] == 8 * 5 * 16 * image
    assert list(items.values())[-1] == pytest.approx(1000 * 65e9 / 1_281_167)
    kinds = with_placement(stages["pretrain"].task.placements, "step")
    offloaded = estimate_step(stages["pretrain"], ZERO, CLUSTER, 16, kinds)
    items = node_memory(recipe, stages["pretrain"], offloaded, 1000)
    assert items["teacher weights (pinned, per rank)"] == 8 * offloaded.memory.teachers["clip"].host


def test_loader_cost_is_read_from_measurements(tmp_path: Path, recipe: Recipe, stages: dict[str, CountedStage]) -> None:
    assert loader_cost(recipe, stages["pretrain"], folder=tmp_path) is None
    (tmp_path / "loader_cpu.json").write_text(
        '{"settings": {"size": "224"}, "machine": {"cpu": "a CPU"}, "rounds": {"mrmae_ds, ffcv backend": '
        '[{"cpu_s_per_1000": 2.0}, {"cpu_s_per_1000": 4.0}, {"cpu_s_per_1000": 3.0}]}}'
    )
    cost = loader_cost(recipe, stages["pretrain"], folder=tmp_path)
    assert cost is not None and (cost.cpu_s_per_1000, cost.size, cost.cpu) == (3.0, 224, "a CPU")
    # Fine-tuning uses RandAugment, which was not measured.
    assert loader_cost(recipe, stages["finetune"], folder=tmp_path) is None
    # A measurement of the user's machine comes first.
    bench = tmp_path / "bench.json"
    bench.write_text((tmp_path / "loader_cpu.json").read_text().replace("4.0", "1.5").replace("a CPU", "this CPU"))
    cost = loader_cost(recipe, stages["pretrain"], bench, tmp_path)
    assert cost is not None and (cost.cpu_s_per_1000, cost.cpu, cost.source) == (2.0, "this CPU", "bench.json")
    with pytest.raises(
        UserError, match=r"has no measurement of 'mrmae_ds, ffcv . RandAugment'; write it with `mrmae data"
    ):
        loader_cost(recipe, stages["finetune"], bench, tmp_path)
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        loader_cost(recipe, stages["pretrain"], tmp_path / "none.json")


def _write_bench(path: Path, **rounds: list[dict[str, object]]) -> Path:
    names = {f"mrmae_ds, ffcv {kind.replace('_', ' ')}": each for kind, each in rounds.items()}
    path.write_text(json.dumps({"settings": {}, "machine": {"cpu": "a CPU"}, "rounds": names}))
    return path


def test_loader_cost_is_that_of_the_stage(tmp_path: Path, recipe: Recipe, stages: dict[str, CountedStage]) -> None:
    """Stages without RandAugment, or with it on the device, have one loader, whose images differ in size."""
    measured: list[dict[str, object]] = [
        {"stage": "finetune", "size": 288, "cpu_s_per_1000": 5.0},
        {"stage": "pretrain", "size": 224, "cpu_s_per_1000": 2.0},
    ]
    bench = _write_bench(tmp_path / "bench.json", backend=measured)
    cost = loader_cost(recipe, stages["pretrain"], bench)
    assert cost is not None and (cost.cpu_s_per_1000, cost.size) == (2.0, 224)
    on_device = recipe.model_copy(update={"loader": LoaderConfig(augment_on="device")})
    cost = loader_cost(on_device, stages["finetune"], bench)
    assert cost is not None and (cost.cpu_s_per_1000, cost.size) == (5.0, 288)


@pytest.mark.parametrize("ms", [0.0, -2.0, math.nan, math.inf])
def test_impossible_loader_cost_is_an_error(
    ms: float, tmp_path: Path, recipe: Recipe, stages: dict[str, CountedStage]
) -> None:
    bench = _write_bench(tmp_path / "bench.json", backend=[{"size": 224, "cpu_s_per_1000": ms}])
    with pytest.raises(UserError, match=r"bench\.json: 'mrmae_ds, ffcv backend' took .* must be above 0"):
        loader_cost(recipe, stages["pretrain"], bench)


def plan(*arguments: str, config: str = "small") -> int:
    return main(["plan", "--ds_config", str(CONFIGS / f"{config}.json"), *arguments])


ONE_BLOCK_EACH = "model.overrides={depths: [1, 1, 1]}"
H100 = ("--gpus", "16", "--gpu", "h100-80", "--micro-batch", "16")


def test_command_prints_the_estimates_of_every_stage(
    stages: dict[str, CountedStage], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*H100, "--tflops", "300", *SHORT) == 0
    out = capsys.readouterr().out
    assert "16 x h100-80 (2 nodes of 8)\n" in out and "estimates, not validated on GPUs" in out
    for stage in stages.values():
        step = estimate_step(stage, ZERO, CLUSTER, 16)
        assert re.search(rf"^ +total +{total(step) / 2**30:.2f}  of 73\.3 usable: fits$", out, re.MULTILINE)
        assert step.step_s is not None and f"{step.images_per_s:,.0f} images/s" in out
        hours = step.hours(1_281_167, stage.config.epochs)
        assert (f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}") + " hours for the stage" in out
    assert re.search(r"^ +ZeRO-3 \(as configured\) ", out, re.MULTILINE)
    assert re.search(r"^ +stream +[\d.]+ +0\.00 ", out, re.MULTILINE)
    assert re.search(r"^ +1024 GPUs +batch 1,024: 1 per GPU, but mixup pairs images$", out, re.MULTILINE)
    assert out.count("advice") == 2 and "sustains 300 TFLOP/s" in out


def test_missing_measurement_of_a_loader_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The committed results have no loader with color jitter."""
    assert plan(*H100, "--stage", "pretrain", *SHORT, "stages.pretrain.color_jitter=0.4") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  loader: ")]
    assert "cores of 'mrmae_ds, ffcv + color jitter' are not measured: `mrmae data bench` measures" in line


def test_gpu_without_a_key_is_planned_from_its_memory_and_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpus", "8", "--memory", "24", "--stage", "finetune", *SHORT) == 0
    out = capsys.readouterr().out
    # Without a peak, times are omitted but memory is printed.
    assert "of 20.9 usable" in out and "times are omitted" in out and "images/s," not in out
    assert "pretrain:" not in out
    assert plan("--gpus", "8", "--memory", "24", "--peak", "165", "--stage", "finetune", *SHORT) == 0
    assert "hours for the stage" in capsys.readouterr().out


def test_throughput_of_a_gpu_comes_from_its_data_sheet_or_an_option() -> None:
    def cluster(**options: Any) -> Cluster:
        return make_cluster(PlanRequest(CONFIGS / "small.json", gpus=8, **options))

    assert cluster(gpu="h100-80", tflops=200).sustained == 200e12
    rates = cluster(gpu="h100-80").rates
    assert rates is not None and rates.flops["matmul"] == pytest.approx(0.7 * 989.5e12)
    assert rates.sizes["memory"] == pytest.approx(0.85 * 3.35e12)
    assert cluster(gpu="v100-32").rates is None
    custom = cluster(memory=24, peak=100).rates
    assert custom is not None and custom.sizes["memory"] == pytest.approx(0.85 * 100 * 3.35e12 / 989.5, rel=2e-3)


def test_measured_constants_replace_estimates(tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    measured: dict[str, Any] = {"device": "NVIDIA H100 80GB HBM3", "op_us": 7, "kernel_us": 3, "node_gb_s": 300}
    measured |= {"zero3_first_param_us": 90, "fp32_tflops": 30, "operator_gb_s": {"gelu": 1000, "adamw": 500}}
    measured |= {"matmul_tflops": 500, "memory_gb_s": 2000, "h2d_gb_s": 50, "d2h_gb_s": 40}
    measured |= {"loader_images_per_s_per_core": 1000, "loader_cores": 10}
    path.write_text(json.dumps({"format": 1, "measured": measured}))
    request = PlanRequest(CONFIGS / "small.json", gpus=4, gpu="h100-80", measured=path)
    cluster = make_cluster(request)
    assert cluster.rates is not None and cluster.rates.kernel_s == 3e-6
    assert (cluster.rates.flops["matmul"], cluster.rates.sizes["memory"]) == (500e12, 2e12)
    assert (cluster.rates.flops["matmul_fp32"], cluster.rates.sizes["gelu"]) == (30e12, 1e12)
    assert cluster.rates.sizes["convolution"] == pytest.approx(0.4 * 3.35e12)  # not measured
    assert (cluster.host.operator_s, cluster.host.zero3_first_s) == pytest.approx((7e-6, 90e-6))
    assert cluster.host.zero3_s == CONSTANTS.zero3_param_s  # not measured
    assert cluster.node_loader == 40_000
    assert cluster.collective_s(3e9, 0) == pytest.approx(3 / 4 * 3e9 / 300e9)
    assert cluster.copy_s(4e9) == pytest.approx(0.1)
    assert make_cluster(replace(request, loader=5.0)).node_loader == 5.0
    with pytest.raises(UserError, match=r"measured on NVIDIA H100 80GB HBM3, which is not --gpu h200"):
        make_cluster(replace(request, gpu="h200"))
    path.write_text(json.dumps({"format": 1, "measured": measured | {"device": "Intel Xeon"}}))
    with pytest.raises(UserError, match=r"measured on Intel Xeon, which is not --gpu h100-80"):
        make_cluster(request)
    assert "  measured on Intel Xeon (" in describe_plan(
        replace(request, gpu=None, memory=40, peak=100, stage="finetune", overrides=(ONE_BLOCK_EACH,))
    )


def test_update_takes_the_measured_rate_of_adamw(stages: dict[str, CountedStage]) -> None:
    slow = MeasuredNode(operator_gb_s={"adamw": 0.1})
    step = estimate_step(stages["pretrain"], ZERO.at_stage(1), replace(CLUSTER, measured=slow), 16)
    assert step.compute is not None
    counts, rates = step.memory.zero.counts, replace(CLUSTER, measured=slow).rates
    assert rates is not None
    sizes = ZERO.gradient_types(counts.trainable, counts.trainable_low)
    reduced = 6 * sum(size * elements for size, elements in sizes.items())
    reduced_s = (reduced + 4 * counts.trainable / 16) / rates.sizes["memory"]
    assert step.compute.update_s == pytest.approx(28 * counts.trainable / 16 / 0.1e9 + reduced_s)


@pytest.mark.parametrize(("stage", "reductions"), [(0, 1), (1, 1), (2, 4), (3, 4)])
def test_gradients_are_copied_whenever_they_are_reduced(
    stages: dict[str, CountedStage], stage: int, reductions: int
) -> None:
    """A gradient is read and written six times per reduction, then its rank's share is read for the norm."""
    slow = MeasuredNode(operator_gb_s={"gradients": 1e-3, "adamw": 1e9})
    micro_batch = stages["pretrain"].config.batch_size // CLUSTER.gpus // 4
    step = estimate_step(stages["pretrain"], ZERO.at_stage(stage), replace(CLUSTER, measured=slow), micro_batch)
    counts = step.memory.zero.counts
    size = sum(each * n for each, n in ZERO.gradient_types(counts.trainable, counts.trainable_low).items())
    size = size if stage else 4 * counts.trainable
    norm = 4 * counts.trainable / (CLUSTER.gpus if stage else 1)
    assert step.compute is not None and step.compute.accumulation == 4
    assert step.compute.update_s == pytest.approx((6 * size * reductions + norm) / 1e6, rel=1e-3)


def test_host_constants_are_those_of_the_benchmark() -> None:
    """Medians over Base and Huge with one rank and two, in us."""
    rows = json.loads((host.RESULTS / "host_time_cpu.json").read_text())["constants"]
    assert {(row["config"], row["ranks"]) for row in rows} == {(size, n) for size in ("base", "huge") for n in (1, 2)}
    for name in ("op", "zero1_param", "zero3_first_param", "zero3_param", "update_param"):
        median = statistics.median(row[name] for row in rows)
        assert 1e6 * getattr(CONSTANTS, f"{name}_s") == pytest.approx(median, rel=0.05), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "8", "--gpu", "h300"), r"--gpu h300: unknown GPU; known are .*h200.*--memory"),
        (("--gpus", "8"), r"--gpu is required: v100-16, .*--memory"),
        (("--gpus", "12", "--gpu", "h200"), r"--gpus 12 is not a multiple of 8 GPUs per node; use 8 or 16"),
        ((*H100, "--micro-batch", "3"), r"batch_size 1024 is not a multiple of 48 .*nearest.*1008 or 1056"),
        ((*H100, "--micro-batch", "1"), r"mixup pairs the images of a micro-batch"),
        (("--gpus", "2048", "--gpu", "h200"), r"batch_size 1024 is not a multiple of 262144"),
        ((*H100, "--measured", "no.json"), r"no.json: No such file .*mrmae doctor"),
        ((*H100, "--network", "0"), r"--network must be above 0"),
        ((*H100, "stages.finetune=null", "--stage", "finetune"), r"small has no stage finetune"),
        ((*H100, "stages.pretrain.placement=streams"), r"placement.*stream"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


@pytest.mark.parametrize("command", [["plan", "--gpus", "2", "--gpu", "h100-80"], ["cost"]])
@pytest.mark.parametrize("source", ["weights/none.pth", "runs/none/pretrain"])
def test_an_absent_checkpoint_as_teacher_names_recipe_key_and_fix(
    command: list[str], source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, recipe = CONFIGS / "tiny.json", CONFIGS / "tiny.yaml"
    assert main([*command, "--ds_config", str(config), f"teachers.mae.source={source}"]) == 2
    fix = "get the file as the recipe's header says" if "weights" in source else "run that stage first"
    expected = f"error: {recipe}: teachers.mae.source: {source} does not exist; {fix}, or name a stage folder"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("missing", ["engine config", "recipe"])
def test_a_missing_file_is_reported_before_a_missing_gpu(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS / "small.json" if missing == "recipe" else tmp_path / "none.json"
    recipe = tmp_path / "none.yaml" if missing == "recipe" else CONFIGS / "small.yaml"
    assert main(["plan", "--ds_config", str(config), "--recipe", str(recipe), "--gpus", "8"]) == 2
    assert "no such file" in capsys.readouterr().err


ENGINES = sorted(path.stem for path in CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", ENGINES)
def test_plans_every_engine_config(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpus", "2", "--gpu", "h100-80", "--stage", "finetune", ONE_BLOCK_EACH, config=name) == 0
    out = capsys.readouterr().out
    assert "total" in out and "advice" in out
    if name.endswith("-offload"):
        assert "offloaded to cpu" in out and "optimizer update on the host" in out
        assert "without offloading it would fit too" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENGINES if not name.startswith("tiny")])
def test_plans_every_engine_config_at_full_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpus", "8", "--gpu", "h100-80", config=name) == 0
    out = capsys.readouterr().out
    assert "usable: fits" in out and "DOES NOT FIT" not in out


def test_benchmark_results_exist() -> None:
    assert host.RESULTS.is_dir()
