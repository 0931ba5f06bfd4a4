"""The report of ``mrmae plan``: memory, and estimates of time, communication and scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mrmae_ds.config.engine import accumulation_steps, check_ranks, default_recipe, load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_TRAIN_SAMPLES
from mrmae_ds.planning.estimates.cluster import Cluster, check_cluster
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.step import estimate_step
from mrmae_ds.planning.fake_step import build_meta_task
from mrmae_ds.planning.render import stage_lines
from mrmae_ds.planning.stage import count_stage
from mrmae_ds.profiling.flops import COUNTED_STAGES, recipe_cost
from mrmae_ds.profiling.gpus import GPUS, Gpu, find_gpu
from mrmae_ds.units import TERA


@dataclass(frozen=True)
class PlanRequest:
    """Command line of ``mrmae plan``; ``cli/plan.py`` documents the options.

    Attributes:
        ds_config: engine config.
        gpus: number of GPUs.
        gpu: key of the GPU in profiling/gpus.py; None if ``memory`` is given.
        stage: the only stage to plan; None plans all training stages.
        gpus_per_node: number of GPUs of a node.
        recipe: default: the one beside ``ds_config``.
        num_images: images of an epoch.
        classes: classes of the data set.
        network: bandwidth of a GPU to other nodes, in GB/s per direction.
        mfu: share of the GPU's peak that the counted operations reach; None uses the default.
        tflops: sustained TFLOP/s of a GPU, instead of ``mfu``.
        memory: GiB of a GPU.
        peak: peak dense bf16 TFLOP/s of a GPU.
        micro_batch: instead of the engine config's.
        loader: images/s that a node's loader delivers.
        overrides: ``key.path=value`` for the recipe.
    """

    ds_config: Path
    gpus: int
    gpu: str | None = None
    stage: str | None = None
    gpus_per_node: int = 8
    recipe: Path | None = None
    num_images: int = IMAGENET_TRAIN_SAMPLES
    classes: int = IMAGENET_CLASSES
    network: float = CONSTANTS.network_gbs
    mfu: float | None = None
    tflops: float | None = None
    memory: float | None = None
    peak: float | None = None
    micro_batch: int | None = None
    loader: float | None = None
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
    check_ranks(config, cluster.gpus, cluster.gpus_in_node)
    lines = [f"{path} with {request.ds_config} on {_hardware(cluster)}"]
    stages = [name for name in COUNTED_STAGES if getattr(recipe.stages, name)]
    for name in stages:
        accumulation_steps(config, getattr(recipe.stages, name).batch_size, cluster.gpus, str(path))
    # Building the tasks reports their errors before the first is traced.
    tasks = [build_meta_task(recipe, name, config, request.classes) for name in stages]
    for task, cost in zip(tasks, recipe_cost(recipe, config.checkpointing, request.classes), strict=True):
        stage = count_stage(task, config, cost)
        step = estimate_step(stage, config.zero, cluster, config.micro_batch)
        lines += ["", *stage_lines(recipe, config, stage, step, request.num_images, request.loader)]
    lines += [
        "",
        "memory is that of DeepSpeed 0.19.8 with AdamW: within 3 % of real steps on the CPU "
        "(benchmarks/plan_memory.py), not compared with a GPU yet",
        "assumptions of the estimates (mrmae_ds/planning/estimates/constants.yaml)",
    ]
    return "\n".join([*lines, *(f"  {line}" for line in _assumptions(request, cluster, config.zero))])


def make_cluster(request: PlanRequest) -> Cluster:
    """Build the cluster of a request.

    Raises:
        UserError: for an unknown GPU or an invalid number.
    """
    _check_numbers(request)
    check_cluster(request.gpus, request.gpus_per_node)
    gpu = _gpu(request)
    tflops = request.tflops
    if tflops is None and gpu.peak_tflops is not None:
        tflops = gpu.peak_tflops * (request.mfu or CONSTANTS.mfu)
    elif tflops is None and request.mfu is not None:
        raise UserError(f"--mfu: the bf16 peak of {gpu.key} is unknown; pass --tflops instead")
    sustained = None if tflops is None else tflops * TERA
    return Cluster(gpu, request.gpus, request.gpus_per_node, request.network, sustained)


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
        return recipe
    recipe.stage(stage)  # type: ignore[call-overload]
    others: dict[str, None] = {name: None for name in COUNTED_STAGES if name != stage}
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update=others)})


def _check_numbers(request: PlanRequest) -> None:
    numbers = {
        "--num-images": request.num_images,
        "--classes": request.classes,
        "--network": request.network,
        "--mfu": request.mfu,
        "--tflops": request.tflops,
        "--memory": request.memory,
        "--peak": request.peak,
        "--micro-batch": request.micro_batch,
        "--loader": request.loader,
    }
    for option, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{option} must be above 0, got {number:g}")
    if request.mfu is not None and request.mfu > 1:
        raise UserError(f"--mfu is a share of the peak, at most 1, got {request.mfu:g}")
    if request.mfu is not None and request.tflops is not None:
        raise UserError("--mfu and --tflops both set the throughput of a GPU; pass only one")


def _hardware(cluster: Cluster) -> str:
    nodes = f"{cluster.nodes} nodes of {cluster.gpus_per_node}" if cluster.nodes > 1 else "one node"
    return f"{cluster.gpus} x {cluster.gpu.key} ({nodes})"


def _assumptions(request: PlanRequest, cluster: Cluster, zero: ZeroSettings) -> list[str]:
    """Return the assumptions, one per line."""
    gpu = cluster.gpu
    if cluster.sustained is None:
        throughput = f"the bf16 peak of {gpu.key} is unknown, so times are omitted; pass --tflops"
    elif request.tflops is not None:
        throughput = f"each GPU sustains {request.tflops:g} TFLOP/s of the counted operations (--tflops)"
    else:
        throughput = (
            f"each GPU sustains {request.mfu or CONSTANTS.mfu:.0%} (--mfu) of its dense bf16 peak, {gpu.peak_tflops:g} "
            f"TFLOP/s: {cluster.sustained / TERA:.0f} TFLOP/s of the counted operations, including recomputed ones, at "
            "any micro-batch"
        )
    custom = "" if request.gpu else f"; {CONSTANTS.unknown_gpu_gbs:g} GB/s are assumed for a custom GPU"
    lines = [
        throughput,
        f"bandwidth per direction: {gpu.node_gbs:g} GB/s between GPUs of a node, {cluster.network_gbs:g} GB/s per GPU "
        f"to other nodes (--network), {gpu.host_gbs:g} GB/s to the host{custom}; collectives and copies reach "
        f"{CONSTANTS.link_share:.0%} of it",
        f"latency of a collective: {CONSTANTS.call_s * 1e6:.0f} us, and {CONSTANTS.node_s * 1e6:.0f} us per node",
        f"of a GPU's {gpu.memory_gib:g} GiB, {CONSTANTS.context_gib:g} GiB are used by CUDA, NCCL and libraries, and "
        f"{CONSTANTS.fragmentation:.0%} of the rest is lost to fragmentation and kernels' workspaces",
        f"an epoch has {request.num_images:,} images (--num-images); evaluation, checkpoints, startup and the update "
        "on the GPU take no time",
    ]
    if zero.offload_optimizer:
        lines.append(
            f"an update on the host moves {CONSTANTS.update_bytes:g} bytes per element through the node's memory, with "
            f"{CONSTANTS.node_memory_gbs:g} GB/s for all its ranks"
        )
    lines.append(
        f"a rank takes {CONSTANTS.process_gib:g} GiB of host memory before its first tensor; an image of the .beton "
        f"file has {CONSTANTS.image_bytes / 1000:.0f} kB"
    )
    return lines
