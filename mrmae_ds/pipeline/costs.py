"""What a chain will cost, link by link, before anything is submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.data.imagenet_info import IMAGENET_CLASSES, IMAGENET_TRAIN_SAMPLES
from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.pipeline.status import JobStatus
from mrmae_ds.profiling.flops import recipe_cost
from mrmae_ds.tables.costs import number

COUNTED = ("pretrain", "finetune")
PETA, TERA, SECONDS_PER_HOUR = 1e15, 1e12, 3600
_COLUMNS = ("link", "state", "waits for", "nodes", "PFLOP", "GPU-hours")


def operations(link: PipelineJob) -> float | None:
    """Operations of a link's whole stage, evaluation left out; None for stages that are not counted, and for those that
    learn from a run that is not there yet.

    On the link's data if that is there, else on ImageNet-1K's.
    """
    if link.stage not in COUNTED:
        return None
    stages = link.recipe.stages.model_copy(update={name: None for name in COUNTED if name != link.stage})
    recipe = link.recipe.model_copy(update={"stages": stages})
    images, classes = data_set(link) or (IMAGENET_TRAIN_SAMPLES, IMAGENET_CLASSES)
    try:
        (cost,) = recipe_cost(recipe, load_engine_config(link.config).checkpointing, classes)
    except UserError:
        return None
    return float(cost.total(images))


def data_set(link: PipelineJob) -> tuple[int, int] | None:
    """Images and classes of a link's training set; None if it is not there."""
    try:
        data = check_beton(link.recipe.data.train)
    except UserError:
        return None
    return data.num_samples, data.num_classes


def plan(links: Sequence[PipelineJob], known: Mapping[str, JobStatus], tflops: float) -> str:
    """The chain as text: a line a link, and what is still to be paid.

    Args:
        links: in the order of their needs. known: the status of each.
        tflops: what a GPU is assumed to sustain, in TFLOP/s.
    """
    lines, seen, total, uncounted = [_COLUMNS], {}, 0.0, 0
    for link in links:
        status = known[link.key]
        # Seeds of one recipe cost the same.
        hashed = (link.recipe.hash(link.stage), link.config)
        if hashed not in seen:
            seen[hashed] = operations(link)
        work = seen[hashed]
        hours = None if work is None else work / (tflops * TERA) / SECONDS_PER_HOUR
        if status.missing and hours:
            total += hours
        uncounted += status.missing and link.stage in COUNTED and work is None
        lines.append(
            (
                link.key,
                f"{status.state}{f' ({status.detail})' if status.detail else ''}",
                ", ".join(need for need in link.needs if known[need].state != "finished"),
                str(link.nodes or ""),
                number(None if work is None else work / PETA),
                number(hours),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    right = {"nodes", "PFLOP", "GPU-hours"}
    text = [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    missing = sum(status.missing for status in known.values())
    text.append(
        f"{missing} of {len(links)} links to run, {number(total)} GPU-hours at an assumed {tflops:g} TFLOP/s a GPU; "
        "evaluation is not counted, nor what an interrupted link has done already"
    )
    absent = dict.fromkeys(str(link.recipe.data.train) for link in links if data_set(link) is None)
    text += [f"{path} is not there: ImageNet-1K's {IMAGENET_TRAIN_SAMPLES:,} images are taken" for path in absent]
    if uncounted:
        text.append(f"not counted either: {uncounted} links whose teacher is a run that is not there yet")
    return "\n".join(text)
