"""``mrmae plan``: what a recipe needs on a cluster, before anything is submitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mrmae_ds.config.engine import (
    accumulation_steps,
    check_ranks,
    default_recipe,
    load_engine_config,
)
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_TRAIN_SAMPLES
from mrmae_ds.planning.cluster import (
    CALL_S,
    CONTEXT_GIB,
    FRAGMENTS,
    LINK_SHARE,
    NODE_MEMORY_GBS,
    NODE_S,
    UPDATE_BYTES,
    Cluster,
    check_cluster,
)
from mrmae_ds.planning.estimate import count_stage, estimate
from mrmae_ds.planning.host import IMAGE_BYTES, PROCESS_GIB
from mrmae_ds.planning.render import stage_lines
from mrmae_ds.profiling.flops import recipe_cost
from mrmae_ds.profiling.gpus import GPUS, Gpu, find_gpu

TERA = 1e12
# Published ViT training on such GPUs reaches about this (NeMo's ViT-g/14 on 8 H100: 29 %).
DEFAULT_MFU = 0.35
# One 400 Gb/s adapter a GPU.
DEFAULT_NETWORK_GBS = 50.0
# Of a card that is not in the table: the bus, both ways.
BY_HAND_GBS = 32.0


@dataclass(frozen=True)
class Request:
    """The command line of ``mrmae plan``; see ``cli/plan.py`` for what each means."""

    ds_config: Path
    gpus: int
    gpu: str | None = None
    stage: str | None = None
    gpus_per_node: int = 8
    recipe: Path | None = None
    num_images: int = IMAGENET_TRAIN_SAMPLES
    classes: int = IMAGENET_CLASSES
    network: float = DEFAULT_NETWORK_GBS
    mfu: float | None = None
    tflops: float | None = None
    memory: float | None = None
    peak: float | None = None
    micro_batch: int | None = None
    loader: float | None = None
    overrides: Sequence[str] = ()


def describe_plan(request: Request) -> str:
    """What ``mrmae plan`` prints.

    Raises:
        UserError: for an unknown GPU, numbers that cannot be, a batch that does not divide, or a recipe or an engine
            config that is wrong.
    """
    cluster = make_cluster(request)
    path = request.recipe or default_recipe(request.ds_config)
    config = load_engine_config(request.ds_config)
    recipe = _only(load_recipe(path, list(request.overrides)), request.stage)
    if request.micro_batch is not None:
        config = replace(config, micro_batch=request.micro_batch, declared_accumulation=None)
    check_ranks(config, cluster.gpus, cluster.in_node)
    for stage in (recipe.stages.pretrain, recipe.stages.finetune):
        if stage is not None:
            accumulation_steps(config, stage.batch_size, cluster.gpus, str(path))
    zero = config.zero
    lines = [f"{path} with {request.ds_config} on {_hardware(cluster)}; everything here is an estimate"]
    for cost in recipe_cost(recipe, config.checkpointing, request.classes):
        counted = count_stage(recipe, config, cost, request.classes)
        now = estimate(counted, zero, cluster, config.micro_batch)
        lines += ["", *stage_lines(recipe, config, zero, counted, now, request.num_images, request.loader)]
    lines += ["", "assumed", *(f"  {line}" for line in _assumptions(request, cluster, zero))]
    return "\n".join(lines)


def make_cluster(request: Request) -> Cluster:
    """The accelerators that a request means.

    Raises:
        UserError: for an unknown one, or a number that cannot be.
    """
    _check_numbers(request)
    check_cluster(request.gpus, request.gpus_per_node)
    gpu = _gpu(request)
    sustained = request.tflops
    if sustained is None and gpu.peak_tflops is not None:
        sustained = gpu.peak_tflops * (request.mfu or DEFAULT_MFU)
    elif sustained is None and request.mfu is not None:
        raise UserError(f"--mfu is a share of a peak that {gpu.key} has not; give --tflops instead")
    rate = None if sustained is None else sustained * TERA
    return Cluster(gpu, request.gpus, request.gpus_per_node, request.network, rate)


def _gpu(request: Request) -> Gpu:
    if request.gpu is None and request.memory is None:
        known = ", ".join(gpu.key for gpu in GPUS)
        raise UserError(f"which GPU? --gpu takes {known}; for another card give --memory (GiB) and --peak (TFLOP/s)")
    if request.gpu is None:
        assert request.memory is not None
        return Gpu("a card given by hand", (), request.memory, request.peak, BY_HAND_GBS, BY_HAND_GBS)
    gpu = find_gpu(request.gpu)
    return replace(gpu, memory_gib=request.memory or gpu.memory_gib, peak_tflops=request.peak or gpu.peak_tflops)


def _only(recipe: Recipe, stage: str | None) -> Recipe:
    """The recipe without its other training stages."""
    if stage is None:
        return recipe
    recipe.stage(stage)  # type: ignore[call-overload]
    other = {"pretrain": "finetune", "finetune": "pretrain"}[stage]
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update={other: None})})


def _check_numbers(request: Request) -> None:
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
        raise UserError("--mfu and --tflops both say how fast a GPU is; give one")


def _hardware(cluster: Cluster) -> str:
    nodes = f"{cluster.nodes} nodes of {cluster.per_node}" if cluster.nodes > 1 else "one node"
    return f"{cluster.gpus} x {cluster.gpu.key} ({nodes})"


def _assumptions(request: Request, cluster: Cluster, zero: ZeroSettings) -> list[str]:
    """A line each."""
    offloaded = (
        f"an update on the host moves {UPDATE_BYTES} bytes an element through the node's memory, "
        f"{NODE_MEMORY_GBS:g} GB/s for all its processes"
    )
    gpu = cluster.gpu
    if cluster.sustained is None:
        rate = f"{gpu.key} has no bf16 peak in the table, so times are left out; give --tflops"
    elif request.tflops is not None:
        rate = f"each GPU sustains {request.tflops:g} TFLOP/s of the counted operations (--tflops)"
    else:
        rate = (
            f"each GPU sustains {request.mfu or DEFAULT_MFU:.0%} (--mfu) of {gpu.peak_tflops:g} TFLOP/s, the dense "
            f"bf16 peak: {cluster.sustained / TERA:.0f} TFLOP/s of the counted operations, recomputed ones included, "
            "whatever the micro-batch"
        )
    card = "" if request.gpu else f"; a card given by hand has {BY_HAND_GBS:g} GB/s to each"
    return [
        rate,
        f"links, one way: {gpu.node_gbs:g} GB/s to a GPU of the node, {cluster.network_gbs:g} GB/s a GPU to other "
        f"nodes (--network), {gpu.host_gbs:g} GB/s to the host{card}; collectives and copies reach {LINK_SHARE:.0%}",
        f"a collective takes {CALL_S * 1e6:.0f} us and {NODE_S * 1e6:.0f} us a node beside its bytes",
        f"a GPU has {gpu.memory_gib:g} GiB; {CONTEXT_GIB:g} GiB go to CUDA, NCCL and libraries, {FRAGMENTS:.0%} of the "
        "rest to the allocator's gaps and kernels' workspaces",
        f"an epoch has {request.num_images:,} images (--num-images); evaluation, checkpoints, start and the "
        "GPU's update take no time",
        *([offloaded] if zero.offload_optimizer else []),
        f"a process takes {PROCESS_GIB:g} GiB of host memory before its first tensor; an image of the .beton "
        f"{IMAGE_BYTES / 1000:.0f} kB",
        "memory is of DeepSpeed 0.19.8 with AdamW: within 3 % of real steps on the CPU (benchmarks/plan_memory.py), "
        "compared on no GPU yet",
    ]
