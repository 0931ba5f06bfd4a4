"""Format the plan of a stage as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.planning.estimates.advice import advise
from mrmae_ds.planning.estimates.host import loader_cost, loader_name, node_memory
from mrmae_ds.planning.estimates.scale import bottleneck, reason_for_none, scaling
from mrmae_ds.planning.estimates.step import StepEstimate, estimate_step, largest_fitting
from mrmae_ds.planning.peak_memory import phase_peaks
from mrmae_ds.planning.stage import CountedStage, with_placement
from mrmae_ds.units import GIB, counted

PLACEMENTS = ("device", "step", "stream", "sharded")
_NAME_WIDTH = 44


def stage_lines(
    recipe: Recipe,
    config: EngineConfig,
    stage: CountedStage,
    step: StepEstimate,
    num_images: int,
) -> list[str]:
    """Return the lines that ``mrmae plan`` prints for a stage.

    Args:
        recipe: the recipe.
        config: the engine config.
        stage: the stage.
        step: estimate with the engine config's settings.
        num_images: images of an epoch.
    """
    memory, zero = step.memory, config.zero
    lines = [
        f"{stage.name}: {counted(stage.config.epochs, 'epoch')} at {stage.task.image_size} pixels, batch "
        f"{memory.batch:,} = micro-batch {memory.micro_batch} x {counted(step.cluster.gpus, 'GPU')} x accumulation "
        f"{memory.zero.accumulation}",
        f"  {_parameters(step)}",
        f"  {_settings(config)}",
        *_memory_lines(stage, step),
        "  estimates, not validated on GPUs:",
        *_micro_batch_lines(stage, zero, step),
        *_transfer_lines(step),
        *_time_lines(recipe, stage, step, num_images),
        *_node_lines(recipe, stage, step, num_images),
        *_zero_table(stage, zero, step),
        *_placement_table(stage, zero, step),
        *_scale_table(stage, zero, step, num_images),
        "  advice",
    ]
    return lines + [f"    - {sentence}" for sentence in advise(stage, step, zero)]


def _parameters(step: StepEstimate) -> str:
    counts = step.memory.zero.counts
    trainable = "all trainable" if not counts.frozen else f"{counts.trainable / 1e6:.2f} M trainable"
    return f"{counts.total / 1e6:.2f} M parameters, {trainable}, {counts.encoder / 1e6:.2f} M in the encoder"


def _settings(config: EngineConfig) -> str:
    zero, plan = config.zero, config.checkpointing
    precision = "bf16 by autocast" if zero.autocast else "bf16 with float32 masters" if zero.bf16 else "float32"
    words = {0: "none", 1: "all"}
    parts = {"conv stages": plan.conv_stages, "transformer": plan.transformer, "decoder": plan.decoder}
    recomputed = ", ".join(f"{name} {words.get(every, f'every {every}th')}" for name, every in parts.items())
    devices = {"optimizer": zero.offload_optimizer, "parameters": zero.offload_param}
    offloaded = "".join(f", {name} offloaded to {device}" for name, device in devices.items() if device)
    return f"ZeRO-{zero.stage}{offloaded}, {precision}; recomputed blocks: {recomputed}"


def _memory_lines(stage: CountedStage, step: StepEstimate) -> Iterator[str]:
    memory, peak = step.memory, step.memory.peak
    fits = f"of {step.cluster.usable_memory / GIB:.1f} usable: {'fits' if step.fits else 'DOES NOT FIT'}"
    rows = [(name, f"{size / GIB:.2f}", "") for name, size in peak.items.items()]
    rows.append(("total", f"{peak.total / GIB:.2f}", fits))
    yield from aligned_table(f"peak GPU memory ({peak.name})", ("GiB", ""), rows)
    peaks = phase_peaks(memory.zero, stage.timeline, memory.teachers, memory.micro_batch)
    others = ", ".join(f"{phase.name} {phase.total / GIB:.2f}" for phase in peaks if phase.name != peak.name)
    yield f"    other phases: {others}"


def _micro_batch_lines(stage: CountedStage, zero: ZeroSettings, step: StepEstimate) -> Iterator[str]:
    best = largest_fitting(stage, zero, step.cluster)
    if best is None:
        yield "  no micro-batch that divides the batch fits"
    else:
        yield (
            f"  largest micro-batch that fits and divides the batch: {best.memory.micro_batch} "
            f"({best.memory.peak.total / GIB:.2f} GiB, accumulation {best.memory.zero.accumulation})"
        )


def _transfer_lines(step: StepEstimate) -> Iterator[str]:
    if not step.transfers:
        yield "  no communication between GPUs or with the host"
        return
    rows = [
        (
            transfer.name,
            f"{transfer.size / 1e9:.2f}",
            f"{transfer.calls:,}" if transfer.calls else "",
            f"{1000 * transfer.seconds:.1f}",
            "overlaps computation" if transfer.overlapped else "computation waits",
        )
        for transfer in step.transfers
    ]
    yield from aligned_table("communication per step", ("GB", "calls", "ms", ""), rows)


def _time_lines(recipe: Recipe, stage: CountedStage, step: StepEstimate, num_images: int) -> Iterator[str]:
    compute, waiting = step.compute, step.waiting_s
    if compute is None or waiting is None or step.step_s is None or step.images_per_s is None:
        return
    hours = step.hours(num_images, stage.config.epochs)
    yield (
        f"  time: {1000 * step.step_s:,.0f} ms per step; {step.images_per_s:,.0f} images/s, "
        f"{step.images_per_s / step.cluster.gpus:,.1f} per GPU; {_hours(hours)} hours for the stage"
    )
    several = compute.accumulation > 1 and compute.host_s < compute.first_host_s
    later = f", {1000 * compute.host_s:,.1f} after the first of a step" if several else ""
    operators, tensors = len(stage.timeline.operators), step.memory.zero.counts.tensors
    yield (
        f"  a micro-batch: the GPU computes {1000 * compute.gpu_s:,.1f} ms; the host issues {operators:,} operators "
        f"and handles {tensors:,} parameters for ZeRO-{step.memory.zero.zero.stage} in "
        f"{1000 * compute.first_host_s:,.1f} ms{later}"
    )
    yield f"  once a step: {1000 * compute.update_s:,.1f} ms update, {1000 * waiting:,.1f} ms waiting for transfers"
    if step.node_demand is not None:
        yield f"  loader: {step.node_demand:,.0f} images/s per node" + _cores(recipe, stage, step)


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}"


def _cores(recipe: Recipe, stage: CountedStage, step: StepEstimate) -> str:
    transform = stage.task.transform
    if transform is None or step.node_demand is None:
        return ""
    cost = loader_cost(recipe, stage, step.cluster.loader_bench)
    if cost is None:
        name = loader_name(recipe.data.backend, transform.of_workers(recipe.loader).augment)
        return f"; cores of {name!r} are not measured: `mrmae data bench` measures them for --loader-bench"
    cores = step.node_demand * cost.cpu_s_per_1000 / 1000
    return (
        f": {cores:,.1f} cores, {cores / step.cluster.gpus_in_node:,.1f} a GPU, at {cost.cpu_s_per_1000:.2f} CPU-s per "
        f"1,000 ({cost.size} pixels, {cost.cpu}; measured, {cost.source})"
    )


def _node_lines(recipe: Recipe, stage: CountedStage, step: StepEstimate, num_images: int) -> Iterator[str]:
    items = node_memory(recipe, stage, step, num_images)
    rows = [(name, f"{size / GIB:.2f}") for name, size in items.items()]
    rows.append(("total", f"{sum(items.values()) / GIB:.2f}"))
    yield from aligned_table("host memory of a node", ("GiB",), rows)


def _zero_table(stage: CountedStage, zero: ZeroSettings, step: StepEstimate) -> Iterator[str]:
    rows = []
    for number in range(4):
        settings = zero.at_stage(number)
        other = estimate_step(stage, settings, step.cluster, step.memory.micro_batch)
        best = largest_fitting(stage, settings, step.cluster)
        rows.append(
            (
                f"ZeRO-{number}{' (as configured)' if settings == zero else ''}",
                f"{other.memory.peak.total / GIB:.2f}",
                "yes" if other.fits else "no",
                f"{sum(transfer.size for transfer in other.transfers) / 1e9:.2f}",
                _milliseconds(other.step_s),
                "none" if best is None else str(best.memory.micro_batch),
            )
        )
    columns = ("GiB", "fits", "GB sent", "step, ms", "largest micro-batch")
    yield from aligned_table("ZeRO stages at this micro-batch, no offloading", columns, rows)


def _placement_table(stage: CountedStage, zero: ZeroSettings, step: StepEstimate) -> Iterator[str]:
    if not stage.teachers:
        return
    rows = []
    for kind in PLACEMENTS:
        placements = with_placement(stage.task.placements, kind)
        other = estimate_step(stage, zero, step.cluster, step.memory.micro_batch, placements)
        idle = sum(weights.idle for weights in other.memory.teachers.values())
        peak, time = f"{other.memory.peak.total / GIB:.2f}", _milliseconds(other.step_s)
        rows.append((kind, peak, f"{idle / GIB:.2f}", time, "yes" if other.fits else "no"))
    yield from aligned_table("placement of all teachers", ("GiB", "weights between calls", "step, ms", "fits"), rows)


def _scale_table(stage: CountedStage, zero: ZeroSettings, step: StepEstimate, num_images: int) -> Iterator[str]:
    rows = []
    for gpus, best in scaling(stage, zero, step.cluster):
        if best is None:
            rows.append((f"{gpus} GPUs", "", "", "", "", reason_for_none(stage, gpus)))
            continue
        throughput, node_throughput = best.images_per_s, best.node_demand
        rows.append(
            (
                f"{gpus} GPUs",
                f"{best.memory.micro_batch} x {best.memory.zero.accumulation}",
                _hours(best.hours(num_images, stage.config.epochs)),
                "" if throughput is None else f"{throughput:,.0f}",
                "" if node_throughput is None else f"{node_throughput:,.0f}",
                "" if throughput is None else bottleneck(best),
            )
        )
    columns = ("micro-batch", "hours", "images/s", "per node", "bottleneck")
    yield from aligned_table("scaling, at the largest micro-batch", columns, rows)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def aligned_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield one line per row; numbers are right-aligned, a last column of words left-aligned."""
    widths = [max(len(line[i]) for line in ((title, *columns), *rows)) for i in range(len(columns) + 1)]
    widths[0] = max(widths[0], _NAME_WIDTH)
    words = any(len(row[-1].split()) > 1 for row in rows)
    for number, line in enumerate((("", *columns), *rows)):
        name = f"  {title}".ljust(widths[0] + 4) if number == 0 else f"    {line[0]}".ljust(widths[0] + 4)
        last = len(columns)
        cells = [
            f"  {cell:<{width}}" if words and i == last else f"  {cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line[1:], widths[1:], strict=True), 1)
        ]
        yield (name + "".join(cells)).rstrip()
