"""A stage's plan in words and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.planning.advice import advise, waits_for
from mrmae_ds.planning.estimate import CountedStage, Estimate, estimate, largest_fitting, with_placement
from mrmae_ds.planning.host import loader_cost, node_memory
from mrmae_ds.planning.peak_memory import moments
from mrmae_ds.profiling.gpus import GIB

PLACEMENTS = ("device", "step", "stream", "sharded")
SCALE = (8, 16, 32, 64, 128, 256, 512, 1024)
_NAME = 44


def stage_lines(
    recipe: Recipe,
    config: EngineConfig,
    zero: ZeroSettings,
    stage: CountedStage,
    now: Estimate,
    num_images: int,
    loader_rate: float | None,
) -> list[str]:
    """What ``mrmae plan`` prints of one stage.

    Args:
        recipe, config: as read. zero: the config's settings.
        stage: counted. now: its estimate as the config has it.
        num_images: of an epoch.
        loader_rate: images/s that the loader of a node delivers; None is unknown.
    """
    size = stage.simulation.task.image_size
    lines = [
        f"{stage.name}: {stage.config.epochs} epochs at {size} pixels, batch {now.batch:,} = micro-batch "
        f"{now.micro_batch} x {now.cluster.gpus} GPUs x accumulation {now.engine.accumulation}",
        f"  {_parameters(now)}",
        f"  {_settings(config, zero)}",
        *_memory_lines(stage, zero, now),
        *_flow_lines(now),
        *_time_lines(recipe, stage, now, num_images),
        *_node_lines(recipe, stage, now, num_images),
        *_zero_table(stage, zero, now),
        *_placement_table(stage, zero, now),
        *_scale_table(stage, zero, now, num_images, loader_rate),
        "  advice",
    ]
    return lines + [f"    - {sentence}" for sentence in advise(stage, now, zero, loader_rate)]


def _parameters(now: Estimate) -> str:
    census = now.engine.census
    trainable = "all trainable" if not census.frozen else f"{census.trainable / 1e6:.2f} M trainable"
    return f"{census.total / 1e6:.2f} M parameters, {trainable}, {census.encoder / 1e6:.2f} M in the encoder"


def _settings(config: EngineConfig, zero: ZeroSettings) -> str:
    precision = "bf16 by autocast" if zero.autocast else "bf16 with float32 masters" if zero.bf16 else "float32"
    plan = config.checkpointing
    words = {0: "none", 1: "all"}
    parts = {"conv stages": plan.conv_stages, "transformer": plan.transformer, "decoder": plan.decoder}
    again = ", ".join(f"{name} {words.get(every, f'every {every}th')}" for name, every in parts.items())
    offloaded = {"optimizer": zero.offload_optimizer, "parameters": zero.offload_param}
    away = "".join(f", {name} offloaded to {where}" for name, where in offloaded.items() if where)
    return f"ZeRO-{zero.stage}{away}, {precision}; recomputed blocks: {again}"


def _memory_lines(stage: CountedStage, zero: ZeroSettings, now: Estimate) -> Iterator[str]:
    usable, most = now.cluster.usable / GIB, now.fullest
    verdict = f"of {usable:.1f} usable: {'fits' if now.fits else 'DOES NOT FIT'}"
    rows = [(name, f"{size / GIB:.2f}", "") for name, size in most.items.items()]
    rows.append(("together", f"{most.total / GIB:.2f}", verdict))
    yield from _table(f"memory of a GPU at its fullest ({most.name})", ("GiB", ""), rows)
    parts = moments(now.engine, stage.simulation.timeline, now.placed, now.micro_batch)
    others = ", ".join(f"{moment.name} {moment.total / GIB:.2f}" for moment in parts if moment.name != most.name)
    yield f"    at other moments: {others}"
    best = largest_fitting(stage, zero, now.cluster)
    if best is None:
        yield "    no micro-batch that divides the batch fits"
    else:
        yield (
            f"    largest micro-batch that fits and divides the batch: {best.micro_batch} "
            f"({best.fullest.total / GIB:.2f} GiB, accumulation {best.engine.accumulation})"
        )


def _flow_lines(now: Estimate) -> Iterator[str]:
    if not now.flows:
        yield "  nothing travels between GPUs or to the host"
        return
    rows = [
        (
            flow.name,
            f"{flow.size / 1e9:.2f}",
            f"{flow.calls:,}" if flow.calls else "",
            f"{1000 * flow.seconds:.1f}",
            "beside computing" if flow.hidden else "computing waits",
        )
        for flow in now.flows
    ]
    yield from _table("what travels in a step", ("GB", "calls", "ms", ""), rows)


def _time_lines(recipe: Recipe, stage: CountedStage, now: Estimate, num_images: int) -> Iterator[str]:
    if now.step_s is None or now.computing_s is None or now.waiting_s is None or now.images_per_s is None:
        return
    hours = now.hours(num_images, stage.config.epochs)
    yield (
        f"  time: a step {1000 * now.step_s:,.0f} ms ({1000 * now.computing_s:,.0f} computing, "
        f"{1000 * now.waiting_s:,.0f} waiting); {now.images_per_s:,.0f} images/s, "
        f"{now.images_per_s / now.cluster.gpus:,.1f} a GPU; {_hours(hours)} hours for the stage"
    )
    rate = now.images_per_s / now.cluster.nodes
    yield f"  each node must be given {rate:,.0f} images/s" + _cores(recipe, stage, rate)


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}"


def _cores(recipe: Recipe, stage: CountedStage, rate: float) -> str:
    cost = loader_cost(recipe, stage)
    if cost is None:
        return ""
    cores = rate * cost.cpu_s_per_1000 / 1000
    return f": {cores:,.1f} cores at {cost.cpu_s_per_1000:.2f} CPU-s per 1,000 ({cost.size} pixels, {cost.cpu})"


def _node_lines(recipe: Recipe, stage: CountedStage, now: Estimate, num_images: int) -> Iterator[str]:
    items = node_memory(recipe, stage, now, num_images)
    rows = [(name, f"{size / GIB:.2f}") for name, size in items.items()]
    rows.append(("together", f"{sum(items.values()) / GIB:.2f}"))
    yield from _table("host memory of a node", ("GiB",), rows)


def _zero_table(stage: CountedStage, zero: ZeroSettings, now: Estimate) -> Iterator[str]:
    rows = []
    for number in range(4):
        settings = zero.at_stage(number)
        there = estimate(stage, settings, now.cluster, now.micro_batch)
        best = largest_fitting(stage, settings, now.cluster)
        rows.append(
            (
                f"ZeRO-{number}{' (as configured)' if settings == zero else ''}",
                f"{there.fullest.total / GIB:.2f}",
                "yes" if there.fits else "no",
                f"{sum(flow.size for flow in there.flows) / 1e9:.2f}",
                _milliseconds(there.waiting_s),
                "none" if best is None else str(best.micro_batch),
            )
        )
    columns = ("GiB", "fits", "GB sent", "waiting, ms", "largest micro-batch")
    yield from _table("ZeRO at this micro-batch, nothing offloaded", columns, rows)


def _placement_table(stage: CountedStage, zero: ZeroSettings, now: Estimate) -> Iterator[str]:
    if not stage.teachers:
        return
    rows = []
    for kind in PLACEMENTS:
        there = estimate(stage, zero, now.cluster, now.micro_batch, with_placement(stage.placements, kind))
        idle = sum(placed.idle for placed in there.placed.values())
        waiting = _milliseconds(there.waiting_s)
        rows.append(
            (kind, f"{there.fullest.total / GIB:.2f}", f"{idle / GIB:.2f}", waiting, "yes" if there.fits else "no")
        )
    yield from _table("teachers, all placed so", ("GiB", "weights between calls", "waiting, ms", "fits"), rows)


def _scale_table(
    stage: CountedStage, zero: ZeroSettings, now: Estimate, num_images: int, loader_rate: float | None
) -> Iterator[str]:
    rows = []
    for gpus in SCALE:
        if gpus > now.cluster.per_node and gpus % now.cluster.per_node:
            continue
        each, uneven = divmod(stage.config.batch_size, gpus)
        settings = zero if zero.hpz == 1 or gpus % zero.hpz == 0 else replace(zero, hpz=1)
        best = None if uneven else largest_fitting(stage, settings, now.cluster.of(gpus))
        if best is None:
            rows.append((f"{gpus} GPUs", "", "", "", "", _no_batch(stage, gpus, each, bool(uneven))))
            continue
        rate, hours = best.images_per_s, best.hours(num_images, stage.config.epochs)
        rows.append(
            (
                f"{gpus} GPUs",
                f"{best.micro_batch} x {best.engine.accumulation}",
                _hours(hours),
                "" if rate is None else f"{rate:,.0f}",
                "" if rate is None else f"{rate / best.cluster.nodes:,.0f}",
                "" if rate is None else waits_for(best, loader_rate),
            )
        )
    columns = ("micro-batch", "hours", "images/s", "a node", "the limit")
    yield from _table("fewer and more GPUs, largest micro-batch", columns, rows)


def _no_batch(stage: CountedStage, gpus: int, each: int, uneven: bool) -> str:
    batch = stage.config.batch_size
    if each < 1:
        return f"the batch of {batch:,}: less than an image a GPU"
    if uneven:
        return f"the batch of {batch:,} does not divide; {batch // gpus * gpus:,} would"
    if stage.pairs and each % 2:
        return f"the batch of {batch:,}: {each} a GPU, and mixup pairs images"
    return "memory"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A line a row; numbers to the right, a last column of words to the left."""
    widths = [max(len(line[i]) for line in ((title, *columns), *rows)) for i in range(len(columns) + 1)]
    widths[0] = max(widths[0], _NAME)
    words = any(len(row[-1].split()) > 1 for row in rows)
    for number, line in enumerate((("", *columns), *rows)):
        name = f"  {title}".ljust(widths[0] + 4) if number == 0 else f"    {line[0]}".ljust(widths[0] + 4)
        last = len(columns)
        cells = [
            f"  {cell:<{width}}" if words and i == last else f"  {cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line[1:], widths[1:], strict=True), 1)
        ]
        yield (name + "".join(cells)).rstrip()
