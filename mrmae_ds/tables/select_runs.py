"""Select the runs of a table, name their training, and group repetitions (same recipe, other seed)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_EVAL_SAMPLES, IMAGENET_TRAIN_SAMPLES
from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import FROM_SCRATCH
from mrmae_ds.tables.base import Cell, LeftOut, Run, chance_accuracy, measured_value
from mrmae_ds.tables.paper import IMAGENET


def finetuned_runs(records: Sequence[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Select the runs that can fill a cell of accuracy.

    Other stages are skipped, as are evaluations of a single model, which repeat the result of its fine-tuning.

    Returns:
        The usable runs; and the other fine-tuning runs, each with the reason.
    """
    candidates = [run for run in records if run[1].stage == "finetune" or len(run[1].members) > 1]
    left_out = [LeftOut(run, reason) for run in candidates if (reason := _unusable(run[1]))]
    return [run for run in candidates if not _unusable(run[1])], left_out


def linear_probes(records: Sequence[Run]) -> tuple[Run, ...]:
    """Return the finished linear probes, in the order of their folders."""
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
        return "its members were fine-tuned on different or unknown data"
    return None


def dataset_labels(runs: Sequence[Run]) -> list[str]:
    """Name each run's dataset; runs on different parts of one, or with other classes, get different names.

    The plain name "ImageNet-1K" is reserved for the whole dataset, so that only comparable runs appear beside the
    paper's numbers.
    """
    identities = [_identity(record) for _, record in runs]
    variants: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for name, *rest in identities:
        variants[name].add(tuple(rest))
    labels = []
    for name, classes, samples, evaluated in identities:
        whole = (IMAGENET_CLASSES, IMAGENET_TRAIN_SAMPLES, IMAGENET_EVAL_SAMPLES)
        plain = (classes, samples, evaluated) == whole if name == IMAGENET else len(variants[name]) == 1
        part = f" part: {classes} classes, {samples:,} training and {evaluated:,} evaluation samples"
        labels.append(name if plain else name + part)
    return labels


def _identity(record: RunRecord) -> tuple[str, int | None, int, int | None]:
    data = record.finetune_data or record.data
    name = data.dataset
    if "".join(filter(str.isalnum, name)).lower() in {"imagenet1k", "imagenet", "ilsvrc2012", "in1k"}:
        name = IMAGENET
    return name, data.classes, data.samples, record.results.eval_samples


def describe_training(record: RunRecord, dataset: str) -> str:
    """Describe pre-training, dataset (with its chance accuracy unless it is the paper's) and number of models."""
    models = f", {len(record.members)} models averaged" if record.members else ""
    chance = "" if dataset == IMAGENET else f", chance {chance_accuracy(record):.3g} %"
    return f"{_describe_pretraining(record, dataset)}{chance}{models}"


def _describe_pretraining(record: RunRecord, dataset: str) -> str:
    epochs = record.pretrain_epochs
    inits = [tuning.init if tuning else None for tuning in record.finetunings]
    if not any(inits):
        # The recipes of different methods can train different models; their runs from scratch stay apart.
        model = "" if record.method == FROM_SCRATCH else f", model of {record.method}"
        return f"no pre-training{model}, {dataset}"
    if epochs is None:
        return f"{'different or ' if record.members else ''}unknown pre-training, {dataset}"
    sources = {init.pretrain.dataset if init and init.pretrain else None for init in inits}
    data = record.finetune_data or record.data
    elsewhere = " and ".join(sorted(name for name in sources if name is not None and name != data.dataset))
    return f"{epochs:.4g} ep on {elsewhere}, then {dataset}" if elsewhere else f"{epochs:.4g} ep, {dataset}"


def fill_cell(runs: Sequence[Run], column: str = "") -> tuple[Cell, list[LeftOut]]:
    """Average the newest of `runs` with its repetitions, one per seed.

    Args:
        runs: finished ones with a result.
        column: of an AP; "" is one of accuracies.

    Returns:
        The cell; and the other runs, each with the reason.
    """

    def end(run: Run) -> float:
        return run[1].ended.timestamp() if run[1].ended else 0.0

    newest = max(runs, key=end)[1]
    alike = [run for run in runs if _configuration(run[1]) == _configuration(newest)]
    by_seed = {_repetition(run[1]): run for run in sorted(alike, key=end)}
    chosen = [by_seed[seed] for seed in sorted(by_seed)]
    values = [value for _, record in chosen if (value := measured_value(record, column)) is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    left_out = [LeftOut(run, "a newer run fills the cell") for run in runs if run not in chosen]
    return Cell(statistics.fmean(values), spread, tuple(chosen)), left_out


def _configuration(record: RunRecord) -> tuple[object, ...]:
    recipes = [
        (tuning.recipe_hash, tuning.init.pretrain.recipe_hash if tuning.init and tuning.init.pretrain else None)
        for tuning in record.finetunings
        if tuning
    ]
    return record.recipe_hash, record.data.sha256, record.schedule, tuple(recipes)


def _repetition(record: RunRecord) -> tuple[object, ...]:
    """Return the key that distinguishes repetitions: the seed, or an ensemble's members (its evaluation is exact)."""
    return tuple(member.sha256 for member in record.members) or (record.seed,)
