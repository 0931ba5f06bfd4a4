"""Search for the fastest engine config of a recipe on given GPUs: ``mrmae plan --search``.

Placing teachers off the device and recomputing activations save memory and cost time, so each is tried only if the
fastest engine so far would use a larger micro-batch with more memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mrmae_ds.config.engine import EngineConfig, load_engine_config
from mrmae_ds.config.zero import PROJECT_LEAVES, PROJECT_REUSE, parse_zero
from mrmae_ds.errors import UserError
from mrmae_ds.files import check_writable, replacing
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.planning.estimates.cluster import Cluster
from mrmae_ds.planning.estimates.scale import bottleneck
from mrmae_ds.planning.estimates.step import StepEstimate, estimate_step
from mrmae_ds.planning.render import PLACEMENTS, aligned_table
from mrmae_ds.planning.stage import CountedStage, with_placement
from mrmae_ds.units import GIB

PLANS = (CheckpointPlan(), CheckpointPlan(conv_stages=1), CheckpointPlan(1, 1), CheckpointPlan(1, 1, 1))
OPTIMIZER, PARAMETERS = "offload_optimizer", "offload_param"
# ZeRO stages, and what is offloaded to the host.
ENGINES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ()),
    (2, ()),
    (3, ()),
    (1, (OPTIMIZER,)),
    (3, (OPTIMIZER,)),
    (3, (OPTIMIZER, PARAMETERS)),
)
Trace = Callable[[CheckpointPlan], Sequence[CountedStage]]


@dataclass(frozen=True)
class Candidate:
    """An engine config with a placement of the teachers, and its estimates.

    Attributes:
        config: the engine config; ``as_written()`` is the content of its file.
        placement: of all teachers.
        steps: estimate of each stage.
        hours: of all stages.
    """

    config: EngineConfig
    placement: str
    steps: tuple[StepEstimate, ...]
    hours: float

    @property
    def fits(self) -> bool:
        """True if every stage fits."""
        return all(step.fits for step in self.steps)


def search(config: EngineConfig, trace: Trace, cluster: Cluster, num_images: int) -> list[Candidate]:
    """Return the candidates that fit, fastest first; of two alike, the one tried first, with the simpler engine.

    Args:
        config: its precision and buckets are kept.
        trace: returns the traced stages under a plan of recomputation.
        cluster: the GPUs.
        num_images: images of an epoch.

    Raises:
        UserError: if the GPU's throughput is unknown, the batch does not divide, or nothing fits.
    """
    if cluster.sustained is None and cluster.rates is None:
        raise UserError(f"--search compares times, and the bf16 peak of {cluster.gpu.key} is unknown; pass --tflops")
    found: list[Candidate] = []
    for plan in PLANS:
        stages = trace(plan)
        for placement in PLACEMENTS if any(stage.teachers for stage in stages) else PLACEMENTS[:1]:
            tried = list(_candidates(replace(config, checkpointing=plan), stages, placement, cluster, num_images))
            found += [candidate for candidate in tried if candidate.fits]
            found.sort(key=lambda candidate: candidate.hours)
            if found and all(other.fits for other in tried if other.config.zero == found[0].config.zero):
                return found
    if not found:
        raise UserError(f"nothing fits {cluster.gpus} x {cluster.gpu.key}, not even offloaded and fully recomputed")
    return found


def _candidates(
    config: EngineConfig, stages: Sequence[CountedStage], placement: str, cluster: Cluster, num_images: int
) -> Iterator[Candidate]:
    """Yield every engine with every micro-batch that divides the batches of all stages."""
    sizes = set.intersection(*(set(stage.micro_batches(cluster.gpus)) for stage in stages))
    if not sizes:
        batches = ", ".join(f"{stage.config.batch_size:,}" for stage in stages)
        raise UserError(f"--gpus {cluster.gpus}: no micro-batch divides the batch of {batches} images; use fewer GPUs")
    for number, offloaded in ENGINES:
        for size in sorted(sizes, reverse=True):
            raw = engine_json(config.as_written(), number, offloaded, config.checkpointing, size)
            made = replace(config, _raw=raw, micro_batch=size, zero=parse_zero(config.path, raw))
            steps = tuple(
                estimate_step(stage, made.zero, cluster, size, with_placement(stage.task.placements, placement))
                for stage in stages
            )
            hours = [step.hours(num_images, stage.config.epochs) for step, stage in zip(steps, stages, strict=True)]
            yield Candidate(made, placement, steps, sum(each or 0.0 for each in hours))


def engine_json(
    raw: dict[str, Any], stage: int, offloaded: Sequence[str], plan: CheckpointPlan, micro_batch: int
) -> dict[str, Any]:
    """Return an engine config like this project's own.

    Args:
        raw: engine config whose precision and reduce bucket are kept.
        stage: ZeRO stage, 1 to 3.
        offloaded: keys of what is offloaded to the host.
        plan: blocks that recompute their activations.
        micro_batch: images per rank and micro-batch.
    """
    bucket = raw.get("zero_optimization", {}).get("reduce_bucket_size", 50_000_000)
    zero = {"stage": stage, **{key: {"device": "cpu", "pin_memory": True} for key in offloaded}}
    contiguous = stage < 3 or bool(offloaded)
    zero |= {"overlap_comm": True, "contiguous_gradients": contiguous, "reduce_bucket_size": bucket}
    if stage < 3:
        zero["allgather_bucket_size"] = bucket
    else:
        reuse = 100_000_000 if PARAMETERS in offloaded else PROJECT_REUSE
        zero |= {"stage3_max_live_parameters": reuse, "stage3_max_reuse_distance": reuse}
        zero |= {"stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 0}
        zero |= {"memory_efficient_linear": False, "leaf_module": {"classes": list(PROJECT_LEAVES)}}
    words = {0: "none", 1: "all"}
    recomputed = {key: words.get(every, every) for key, every in vars(plan).items()}
    replaced = ("gradient_accumulation_steps", "zero_optimization", "activation_checkpointing")
    kept = {key: value for key, value in raw.items() if key not in replaced}
    made = {**kept, "train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero}
    return made | ({"activation_checkpointing": recomputed} if any(vars(plan).values()) else {})


def check_new_engine(path: Path) -> None:
    """Check, before a search, that its engine config can be written.

    Raises:
        UserError: if the file exists, or cannot be written.
    """
    if path.is_file():
        raise UserError(f"--write {path}: the file exists; delete it, or choose another name")
    check_writable(path)


def write_engine(candidate: Candidate, path: Path) -> None:
    """Write the engine config of a candidate."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(candidate.config.as_written(), indent=2) + "\n", encoding="utf-8")
    load_engine_config(path)


def search_lines(found: Sequence[Candidate], recipe: Path, written: Path | None) -> list[str]:
    """Return the lines that ``mrmae plan --search`` prints: the fastest candidate of each engine, and a command.

    Args:
        found: from :func:`search`.
        recipe: of the search.
        written: file of the first candidate's engine config; None if it is not written.
    """
    fastest: dict[str, Candidate] = {}
    for candidate in found:
        fastest.setdefault(_engine(candidate.config), candidate)
    rows = [_row(name, candidate) for name, candidate in fastest.items()]
    columns = ("micro-batch", "recomputed", "teachers", "GiB", "step, ms", "images/s", "hours", "limit")
    best = found[0]
    lines = [*aligned_table("fastest config of each engine, estimated", columns, rows), ""]
    if all(candidate.config.checkpointing == CheckpointPlan() for candidate in found):
        lines.append("  recomputation was not tried: it saves memory and costs time, and nothing is short of memory")
    if any(stage.memory.teachers for stage in best.steps) and len({candidate.placement for candidate in found}) == 1:
        lines.append("  other placements were not tried, for the same reason")
    override = "" if best.placement == PLACEMENTS[0] else f" stages.pretrain.placement={best.placement}"
    lines.append(f"  deepspeed train.py --ds_config {written or 'FILE'} --recipe {recipe}{override}")
    return lines


def _engine(config: EngineConfig) -> str:
    zero = config.zero
    parts = {"optimizer": zero.offload_optimizer, "parameters": zero.offload_param}
    offloaded = " and ".join(name for name, device in parts.items() if device)
    return f"ZeRO-{zero.stage}" + (f", {offloaded} offloaded" if offloaded else "")


def _row(name: str, candidate: Candidate) -> tuple[str, ...]:
    def each(values: Iterable[float | None], form: str) -> str:
        return "; ".join("" if value is None else format(value, form) for value in values)

    steps, plan = candidate.steps, vars(candidate.config.checkpointing)
    accumulation = steps[0].memory.zero.accumulation
    return (
        name,
        f"{candidate.config.micro_batch} x {accumulation}",
        ", ".join(part.replace("_", " ") for part, every in plan.items() if every) or "none",
        candidate.placement if any(step.memory.teachers for step in steps) else "",
        each((step.memory.peak.total / GIB for step in steps), ".1f"),
        each((step.step_s and 1000 * step.step_s for step in steps), ".0f"),
        each((step.images_per_s for step in steps), ",.0f"),
        f"{candidate.hours:,.1f}",
        "; ".join(bottleneck(step) for step in steps),
    )
