"""The report of ``mrmae plan``: memory, and estimates of time, communication and scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mrmae_ds.config.engine import EngineConfig, accumulation_steps, check_ranks, default_recipe, load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.stages import TrainStageName
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.detection.roi_heads import OBJECT_SHARE
from mrmae_ds.errors import UserError, errors_of
from mrmae_ds.imagenet import IMAGENET_CLASSES
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.planning.cost_report import epoch_images, stage_costs
from mrmae_ds.planning.estimates.cluster import Cluster, check_cluster
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.step import estimate_step
from mrmae_ds.planning.fake_step import build_meta_task
from mrmae_ds.planning.operator_trace import ATTENTION, CONVOLUTION, MATMUL, MATMUL_FP32, MEMORY, DeviceRates
from mrmae_ds.planning.render import stage_lines
from mrmae_ds.planning.search import check_new_engine, search, search_lines, write_engine
from mrmae_ds.planning.stage import CountedStage, count_stage
from mrmae_ds.profiling.flops import COUNTED_STAGES
from mrmae_ds.profiling.gpus import GPUS, Gpu, find_gpu
from mrmae_ds.profiling.measured_node import MeasuredNode, read_measured, read_step_rates
from mrmae_ds.tables.detectors import COCO_2017
from mrmae_ds.units import GIGA, TERA

PLANNED_STAGES: tuple[TrainStageName, ...] = (*COUNTED_STAGES, "detect")


@dataclass(frozen=True)
class PlanRequest:
    """Command line of ``mrmae plan``; ``cli/plan.py`` documents the options.

    Attributes:
        ds_config: engine config.
        gpus: number of GPUs.
        gpu: key of the GPU in profiling/gpus.py; None if ``memory`` is given.
        stage: the only stage to plan; None plans pre-training and fine-tuning.
        gpus_per_node: number of GPUs of a node.
        recipe: default: the one beside ``ds_config``.
        num_images: images of an epoch; None is ImageNet-1K's, in ``detect`` COCO's.
        classes: classes of the data set; None likewise.
        network: bandwidth of a GPU to other nodes, in GB/s per direction.
        tflops: sustained TFLOP/s of a GPU, instead of the time of each operator.
        measured: JSON file of ``mrmae doctor``, whose constants replace estimates.
        memory: GiB of a GPU.
        peak: peak dense bf16 TFLOP/s of a GPU.
        micro_batch: instead of the engine config's.
        loader: images/s that a node's loader delivers.
        loader_bench: JSON file of ``mrmae data bench``, whose CPU time replaces the committed measurements.
        search: search for the fastest engine config instead.
        write: file for the engine config that the search finds.
        overrides: ``key.path=value`` for the recipe.
    """

    ds_config: Path
    gpus: int
    gpu: str | None = None
    stage: str | None = None
    gpus_per_node: int = 8
    recipe: Path | None = None
    num_images: int | None = None
    classes: int | None = None
    network: float = CONSTANTS.network_gbs
    tflops: float | None = None
    measured: Path | None = None
    memory: float | None = None
    peak: float | None = None
    micro_batch: int | None = None
    loader: float | None = None
    loader_bench: Path | None = None
    search: bool = False
    write: Path | None = None
    overrides: Sequence[str] = ()


def describe_plan(request: PlanRequest) -> str:
    """Return the report that ``mrmae plan`` prints.

    Raises:
        UserError: for an unknown GPU, an invalid number, a batch that does not divide, or an invalid recipe or engine
            config.
    """
    path = request.recipe or default_recipe(request.ds_config)
    config = load_engine_config(request.ds_config)
    recipe = _select_stage(load_recipe(path, list(request.overrides)), request.stage)
    cluster = make_cluster(request)
    if request.micro_batch is not None:
        config = replace(config, micro_batch=request.micro_batch, declared_accumulation=None)
    lines = [f"{path} with {request.ds_config} on {_hardware(cluster)}"]
    if request.search:
        lines += ["", *_search(request, path, recipe, config, cluster)]
    else:
        check_ranks(config, cluster.gpus, cluster.gpus_in_node)
        for name in PLANNED_STAGES:
            if section := getattr(recipe.stages, name):
                accumulation_steps(config, section.batch_size, cluster.gpus, str(path))
        for stage in _count_stages(path, recipe, config, request.classes):
            num_images = epoch_images(stage.cost.stage, request.num_images)
            step = estimate_step(stage, config.zero, cluster, config.micro_batch)
            lines += ["", *stage_lines(recipe, config, stage, step, num_images)]
    lines += [
        "",
        "memory is that of DeepSpeed 0.19.8 with AdamW: within 3 % of real steps on the CPU "
        "(benchmarks/plan_memory.py), not compared with a GPU yet",
        "assumptions of the estimates (mrmae_ds/planning/estimates/constants.yaml)",
    ]
    return "\n".join([*lines, *(f"  {line}" for line in _assumptions(request, recipe, cluster, config.zero))])


def gpu_throughput(request: PlanRequest) -> tuple[float, str]:
    """Return the images/s that a GPU trains in ``request.stage`` if its loader keeps up, and where they are from.

    They are those of a doctor's report, if it has timed steps of this recipe's pre-training, else estimated.

    Raises:
        UserError: as ``describe_plan``, and if the throughput of the GPU is unknown.
    """
    path = request.recipe or default_recipe(request.ds_config)
    config, cluster = load_engine_config(request.ds_config), make_cluster(request)
    recipe = _select_stage(load_recipe(path, list(request.overrides)), request.stage)
    if request.measured is not None and request.stage == "pretrain":
        timed = read_step_rates(request.measured).get(recipe.name)
        if timed:
            return timed, f"measured by mrmae doctor on {cluster.measured.device}, its fastest step"
    check_ranks(config, cluster.gpus, cluster.gpus_in_node)
    (stage,) = _count_stages(path, recipe, config, request.classes)
    demand = estimate_step(stage, config.zero, cluster, config.micro_batch).node_demand
    if demand is None:
        raise UserError(f"the throughput of {cluster.gpu.key} is unknown; pass it with --images-per-s")
    return demand / cluster.gpus_in_node, f"an estimate of mrmae plan for {_hardware(cluster)}, not measured"


def _search(request: PlanRequest, path: Path, recipe: Recipe, config: EngineConfig, cluster: Cluster) -> list[str]:
    """Search, write the first candidate if that is requested, and return the report's lines."""

    def trace(plan: CheckpointPlan) -> list[CountedStage]:
        return list(_count_stages(path, recipe, replace(config, checkpointing=plan), request.classes))

    found = search(config, trace, cluster, _num_images(request, recipe))
    if request.write is not None:
        write_engine(found[0], request.write)
    return search_lines(found, path, request.write)


def _num_images(request: PlanRequest, recipe: Recipe) -> int:
    return epoch_images("detect" if recipe.stages.detect else "pretrain", request.num_images)


def _count_stages(path: Path, recipe: Recipe, config: EngineConfig, classes: int | None) -> Iterator[CountedStage]:
    """Trace the training stages of a recipe, whose file is ``path``."""
    names = [name for name in PLANNED_STAGES if getattr(recipe.stages, name)]
    # Building the tasks reports their errors before the first is traced.
    of_stage = {name: classes or (COCO_2017["classes"] if name == "detect" else IMAGENET_CLASSES) for name in names}
    with errors_of(path):
        tasks = [build_meta_task(recipe, name, config, of_stage[name]) for name in names]
    for task, cost in zip(tasks, stage_costs(recipe, config.checkpointing, classes), strict=True):
        yield count_stage(task, config, cost)


def make_cluster(request: PlanRequest) -> Cluster:
    """Build the cluster of a request.

    Raises:
        UserError: for an unknown GPU or an invalid number.
    """
    _check_numbers(request)
    check_cluster(request.gpus, request.gpus_per_node)
    gpu, sustained = _gpu(request), None if request.tflops is None else request.tflops * TERA
    measured = MeasuredNode() if request.measured is None else read_measured(request.measured)
    if request.measured is not None and gpu.names and measured.device not in gpu.names:
        raise UserError(f"{request.measured} was measured on {measured.device}, which is not --gpu {gpu.key}")
    given = request.loader, request.loader_bench
    cluster = Cluster(gpu, request.gpus, request.gpus_per_node, request.network, sustained, measured, *given)
    if cluster.node_loader is None and measured.loader_images_per_s_per_core and measured.loader_cores:
        rank_rate = measured.loader_images_per_s_per_core * measured.loader_cores
        cluster = replace(cluster, node_loader=rank_rate * cluster.gpus_in_node)
    return cluster


def _gpu(request: PlanRequest) -> Gpu:
    if request.gpu is None and request.memory is None:
        known = ", ".join(gpu.key for gpu in GPUS)
        raise UserError(f"--gpu is required: {known}; for another GPU, pass --memory (GiB) and --peak (TFLOP/s)")
    if request.gpu is None:
        assert request.memory is not None
        bandwidth = CONSTANTS.unknown_gpu_gbs
        return Gpu("custom GPU", (), request.memory, request.peak, bandwidth, bandwidth)
    gpu = find_gpu(request.gpu)
    return replace(gpu, memory_gib=request.memory or gpu.memory_gib, peak_tflops=request.peak or gpu.peak_tflops)


def _select_stage(recipe: Recipe, stage: str | None) -> Recipe:
    """Return the recipe without its other training stages."""
    if stage is None:
        if recipe.stages.detect:
            raise UserError(f"recipe {recipe.name} has the stage detect, whose engine is its own: pass --stage")
        return recipe
    recipe.stage(stage)  # type: ignore[call-overload]
    others: dict[str, None] = {name: None for name in PLANNED_STAGES if name != stage}
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update=others)})


def _check_numbers(request: PlanRequest) -> None:
    numbers = {
        "--num-images": request.num_images,
        "--classes": request.classes,
        "--network": request.network,
        "--tflops": request.tflops,
        "--memory": request.memory,
        "--peak": request.peak,
        "--micro-batch": request.micro_batch,
        "--loader": request.loader,
    }
    if request.write is not None and not request.search:
        raise UserError("--write takes the engine config that a search finds; pass --search too")
    if request.write is not None:
        check_new_engine(request.write)
    for option, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{option} must be above 0, got {number:g}")


def _hardware(cluster: Cluster) -> str:
    nodes = f"{cluster.nodes} nodes of {cluster.gpus_per_node}" if cluster.nodes > 1 else "one node"
    return f"{cluster.gpus} x {cluster.gpu.key} ({nodes})"


def _assumptions(request: PlanRequest, recipe: Recipe, cluster: Cluster, zero: ZeroSettings) -> list[str]:
    """Return the assumptions, one per line."""
    gpu = cluster.gpu
    if request.tflops is not None:
        throughput = f"each GPU sustains {request.tflops:g} TFLOP/s of the counted operations (--tflops)"
    elif cluster.rates is None:
        throughput = f"the bf16 peak of {gpu.key} is unknown, so times are omitted; pass --tflops"
    else:
        throughput = _roofline(cluster.rates)
    custom = "" if request.gpu else f"; {CONSTANTS.unknown_gpu_gbs:g} GB/s are assumed for a custom GPU"
    host = cluster.host
    lines = [
        throughput,
        f"the host needs {host.operator_s * 1e6:.0f} us per operator, and per parameter {host.zero1_s * 1e6:.0f} us "
        f"under ZeRO-1 and 2, {host.zero3_s * 1e6:.0f} us under ZeRO-3 ({host.zero3_first_s * 1e6:.0f} us if it is "
        f"fetched), and {host.update_s * 1e6:.0f} us once a step",
        f"bandwidth per direction: {gpu.node_gbs:g} GB/s between GPUs of a node, {cluster.network_gbs:g} GB/s per GPU "
        f"to other nodes (--network), {gpu.host_gbs:g} GB/s to the host{custom}; collectives and copies reach "
        f"{CONSTANTS.link_share:.0%} of it",
        f"latency of a collective: {CONSTANTS.call_s * 1e6:.0f} us, and {CONSTANTS.node_s * 1e6:.0f} us per node",
        f"of a GPU's {gpu.memory_gib:g} GiB, {CONSTANTS.context_gib:g} GiB are used by CUDA, NCCL and libraries, and "
        f"{CONSTANTS.fragmentation:.0%} of the rest is lost to fragmentation and kernels' workspaces",
        f"an epoch has {_num_images(request, recipe):,} images (--num-images); "
        "evaluation, checkpoints and startup take no time",
    ]
    if zero.offload_optimizer:
        lines.append(
            f"an update on the host moves {CONSTANTS.update_bytes:g} bytes per element through the node's memory, with "
            f"{CONSTANTS.node_memory_gbs:g} GB/s for all its ranks"
        )
    if request.measured is not None:
        names, device = ", ".join(cluster.measured.constants()), cluster.measured.device
        lines.append(f"measured on {device} ({request.measured}), and used in place of the estimates above: {names}")
    lines.append(
        f"a rank takes {CONSTANTS.process_gib:g} GiB of host memory before its first tensor; an image of the .beton "
        f"file has {CONSTANTS.image_bytes / 1000:.0f} kB"
    )
    if stage := recipe.stages.detect:
        drawn = stage.detector.boxes_per_image
        lines.append(
            f"a detector draws the most boxes that it may: {drawn} an image, {int(drawn * OBJECT_SHARE)} of them with "
            "an object; not counted are selecting, matching and suppressing boxes, the objects' masks, and the loader"
        )
    return lines


def _roofline(rates: DeviceRates) -> str:
    """Describe the rates of a GPU."""
    tflops, gbs = (
        {kind: rate / unit for kind, rate in of.items()} for of, unit in ((rates.flops, TERA), (rates.sizes, GIGA))
    )
    return (
        f"an operator takes the longest of its operations at {tflops[MATMUL]:.0f} TFLOP/s ({tflops[ATTENTION]:.0f} in "
        f"attention, {tflops[MATMUL_FP32]:.0f} in float32), its bytes at {gbs[MEMORY]:,.0f} GB/s "
        f"({gbs[CONVOLUTION]:,.0f} in convolutions), and {rates.kernel_s * 1e6:.1f} us; no operators are fused"
    )
