"""Which runs a table may show, how they are named, and which of them are repetitions of each other."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_EVAL_SAMPLES, IMAGENET_TRAIN_SAMPLES
from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import FROM_SCRATCH
from mrmae_ds.tables import paper
from mrmae_ds.tables.write import Cell, Run


def tuned_runs(records: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs that can fill a cell of accuracy, and the others that fine-tuned, each with the reason.

    Other stages are passed over, and so are evaluations of one model, which repeat its fine-tuning's number.
    """
    tuned = [run for run in records if run[1].stage == "finetune" or len(run[1].members) > 1]
    left_out = [f"{run_name(run)}: {reason}" for run in tuned if (reason := _unusable(run[1]))]
    return [run for run in tuned if not _unusable(run[1])], left_out


def probed_runs(records: Sequence[Run]) -> tuple[Run, ...]:
    """Finished linear probes, in the order of their folders."""
    return tuple(
        run
        for run in records
        if run[1].stage == "probe" and run[1].status == "finished" and run[1].results.top1 is not None
    )


def _unusable(record: RunRecord) -> str | None:
    if record.status != "finished":
        return f"not finished (status: {record.status})"
    if record.results.top1 is None:
        return "finished without a top-1 accuracy"
    if record.finetune_data is None:
        return "its members were fine-tuned on different data, or on data that is not known"
    return None


def run_name(run: Run) -> str:
    """Return a run's folder as a reader knows it: from the working directory, else its last two
    components."""
    folder = run[0].resolve()
    try:
        return folder.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return "/".join(folder.parts[-2:])


def sampling_error(record: RunRecord) -> float:
    """Return the binomial standard error of a record's top-1 in percent points: sqrt(p (1 - p) / n)."""
    share = (record.results.top1 or 0.0) / 100
    return 100 * math.sqrt(share * (1 - share) / (record.results.eval_samples or 1))


def chance(record: RunRecord) -> float:
    """Return the accuracy of guessing, in percent."""
    return 100 / (record.data.classes or 1)


def dataset_labels(runs: Sequence[Run]) -> list[str]:
    """Name each run's data set; runs on different parts of one, or with other classes, get different names.

    The plain name "ImageNet-1K" is kept for the whole of it, so that nothing else stands beside the paper's
    numbers.
    """
    identities = [_identity(record) for _, record in runs]
    variants: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for name, *rest in identities:
        variants[name].add(tuple(rest))
    labels = []
    for name, classes, samples, evaluated in identities:
        whole = (IMAGENET_CLASSES, IMAGENET_TRAIN_SAMPLES, IMAGENET_EVAL_SAMPLES)
        plain = (classes, samples, evaluated) == whole if name == paper.IMAGENET else len(variants[name]) == 1
        part = f" part: {classes} classes, {samples:,} training and {evaluated:,} evaluation samples"
        labels.append(name if plain else name + part)
    return labels


def _identity(record: RunRecord) -> tuple[str, int | None, int, int | None]:
    data = record.finetune_data or record.data
    name = data.dataset
    if "".join(filter(str.isalnum, name)).lower() in {"imagenet1k", "imagenet", "ilsvrc2012", "in1k"}:
        name = paper.IMAGENET
    return name, data.classes, data.samples, record.results.eval_samples


def how_trained(record: RunRecord, dataset: str) -> str:
    """In words for a row's label: pre-training, data set (with its level of chance unless it is the paper's), number of
    models."""
    models = f", {len(record.members)} models averaged" if record.members else ""
    guessing = "" if dataset == paper.IMAGENET else f", chance {chance(record):.3g} %"
    return f"{_how_pretrained(record, dataset)}{guessing}{models}"


def _how_pretrained(record: RunRecord, dataset: str) -> str:
    epochs = record.pretrain_epochs
    inits = [tuning.init if tuning else None for tuning in record.finetunings]
    if not any(inits):
        # The recipes of different methods can train different models; their runs from scratch stay apart.
        model = "" if record.method == FROM_SCRATCH else f", model of {record.method}"
        return f"no pre-training{model}, {dataset}"
    known = {init.pretrain.dataset if init and init.pretrain else None for init in inits}
    if epochs is None:
        return f"{'different or ' if record.members else ''}unknown pre-training, {dataset}"
    data = record.finetune_data or record.data
    elsewhere = " and ".join(sorted(name for name in known if name is not None and name != data.dataset))
    return f"{epochs:.4g} ep on {elsewhere}, then {dataset}" if elsewhere else f"{epochs:.4g} ep, {dataset}"


def teachers(record: RunRecord) -> dict[str, str]:
    """The sources of the teachers behind a record's weights, by their names in the recipes."""
    pretrainings = [t.init.pretrain for t in record.finetunings if t and t.init and t.init.pretrain]
    return {name: teacher.source for known in pretrainings for name, teacher in known.teachers.items()}


def fill_cell(runs: Sequence[Run]) -> tuple[Cell, list[str]]:
    """The mean over the newest of `runs` and its repetitions with other seeds, one a seed; and why others are left
    out."""

    def age(run: Run) -> float:
        return run[1].ended.timestamp() if run[1].ended else 0.0

    newest = max(runs, key=age)[1]
    alike = [run for run in runs if _setting(run[1]) == _setting(newest)]
    by_seed = {_replica(run[1]): run for run in sorted(alike, key=age)}
    chosen = [by_seed[seed] for seed in sorted(by_seed)]
    values = [record.results.top1 for _, record in chosen if record.results.top1 is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    left_out = [f"{run_name(run)}: a newer run fills the cell" for run in runs if run not in chosen]
    return Cell(statistics.fmean(values), spread, tuple(chosen)), left_out


def _setting(record: RunRecord) -> tuple[object, ...]:
    behind = [
        (tuning.recipe_hash, tuning.init.pretrain.recipe_hash if tuning.init and tuning.init.pretrain else None)
        for tuning in record.finetunings
        if tuning
    ]
    return record.recipe_hash, record.data.sha256, record.schedule, tuple(behind)


def _replica(record: RunRecord) -> tuple[object, ...]:
    """What tells repetitions apart: the seed; of ensembles the members, because the evaluation draws nothing."""
    return tuple(member.sha256 for member in record.members) or (record.seed,)
