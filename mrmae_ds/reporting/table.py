"""The model-scaling table: the paper's Table 6 and, apart from it, what our own runs measured.

Rules that keep it honest. A cell of ours comes from a finished fine-tuning run, or from the evaluation of
several fine-tuned models together, and nothing else; what did not run stays blank. A row holds runs of one
method, one number of models, one pre-training length and one data set, so that nothing unlike is averaged or
set side by side. The method is the one that really made the initial weights.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mrmae_ds.files import write_text
from mrmae_ds.reporting import paper
from mrmae_ds.reporting.records import FROM_SCRATCH, RunRecord, find_records

METHODS = ("MAE", "MCMAE", "MR-MAE", FROM_SCRATCH)
SIZES = ("Tiny", *paper.TABLE_6.columns)

Run = tuple[Path, RunRecord]


@dataclass(frozen=True)
class Cell:
    """One number: top-1 in percent. Of ours it is the mean over `runs`, which differ in their seed alone.

    `spread` is the sample standard deviation over seeds, None for one seed. `value` is None for the paper's
    dash.
    """

    value: float | None
    spread: float | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Row:
    """Cells of one method from one source, by size; a size that is missing is blank.

    `epochs` are those of pre-training (0: none, None: unknown); `dataset` is "" for a row that was not run.
    """

    method: str
    source: Literal["paper", "ours"]
    label: str
    dataset: str
    epochs: float | None
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """The scaling table. `left_out` tells of fine-tuning runs that fill no cell, and why."""

    sizes: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]

    def to_markdown(self) -> str:
        """Return the table with its footnotes and the runs behind each of our cells, as Markdown."""
        from mrmae_ds.reporting.table_text import to_markdown

        return to_markdown(self)

    def to_csv(self) -> str:
        """Return one line a row and size, with its source, so that a spreadsheet cannot mix them up."""
        from mrmae_ds.reporting.table_text import to_csv

        return to_csv(self)

    def plot(self, path: str | Path) -> None:
        """Draw accuracy over model size to a PNG, one panel a data set."""
        from mrmae_ds.reporting.table_plot import plot

        plot(self, Path(path))


def scaling_table(records: Iterable[Run]) -> Table:
    """Build the table from run folders and their records (see `find_records`); other stages are passed
    over, and so are evaluations of one model, which repeat its fine-tuning's number."""
    tuned = [run for run in records if run[1].stage == "finetune" or len(run[1].members) > 1]
    left_out = [f"{run_name(run)}: {reason}" for run in tuned if (reason := _unusable(run[1]))]
    usable = [run for run in tuned if not _unusable(run[1])]
    datasets = _dataset_labels(usable)
    groups: dict[tuple[str, str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    epochs: dict[tuple[str, str, str], float | None] = {}
    for run, dataset in zip(usable, datasets, strict=True):
        record = run[1]
        key = (record.pretrain_method, dataset, _how_trained(record, dataset))
        groups[key][record.size].append(run)
        epochs[key] = record.pretrain_epochs
    ours: dict[str, list[Row]] = defaultdict(list)
    for key in sorted(groups, key=lambda key: (key[1], epochs[key] is None, epochs[key] or 0.0, key[2])):
        method, dataset, how = key
        cells = {}
        for size, runs in groups[key].items():
            chosen = _seeds_of_newest(runs)
            cells[size] = _mean(chosen)
            left_out += [f"{run_name(run)}: a newer run fills the cell" for run in runs if run not in chosen]
        ours[method].append(Row(method, "ours", f"{method}, ours ({how})", dataset, epochs[key], cells))
    found = {record.size for _, record in usable}
    return Table(_columns(found), tuple(_all_rows(ours)), tuple(left_out))


def write_table(roots: Sequence[str | Path], out_dir: str | Path) -> Table:
    """Build the table from the runs below `roots`, write table.md, table.csv and table.png, and return it.

    Raises UserError for a root that is no folder and for a record that cannot be read.
    """
    table = scaling_table(find_records(roots))
    folder = Path(out_dir)
    write_text(folder / "table.md", table.to_markdown())
    write_text(folder / "table.csv", table.to_csv())
    table.plot(folder / "table.png")
    return table


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


def _unusable(record: RunRecord) -> str | None:
    if record.status != "finished":
        return f"not finished (status: {record.status})"
    if record.results.top1 is None:
        return "finished without a top-1 accuracy"
    if record.tuning_data is None:
        return "its members were fine-tuned on different data, or on data that is not known"
    return None


def _columns(found: set[str]) -> tuple[str, ...]:
    known = [size for size in SIZES if size in paper.TABLE_6.columns or size in found]
    return (*known, *sorted(found - set(SIZES)))


def _all_rows(ours: dict[str, list[Row]]) -> Iterable[Row]:
    printed = {row.method: row for row in paper.TABLE_6.rows}
    for method in (*METHODS, *sorted(ours.keys() - set(METHODS))):
        if row := printed.get(method):
            cells = {size: Cell(value) for size, value in row.cells.items()}
            label = f"{method}, paper ({row.epochs} ep, {paper.TABLE_6.dataset})"
            yield Row(method, "paper", label, paper.TABLE_6.dataset, row.epochs, cells)
        yield from ours.get(method) or [Row(method, "ours", f"{method}, ours (not run)", "", None, {})]


def _dataset_labels(runs: Sequence[Run]) -> list[str]:
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
        whole = (paper.IMAGENET_CLASSES, paper.IMAGENET_TRAIN_SAMPLES, paper.IMAGENET_EVAL_SAMPLES)
        plain = (classes, samples, evaluated) == whole if name == paper.IMAGENET else len(variants[name]) == 1
        part = f" part: {classes} classes, {samples:,} training and {evaluated:,} evaluation samples"
        labels.append(name if plain else name + part)
    return labels


def _identity(record: RunRecord) -> tuple[str, int | None, int, int | None]:
    data = record.tuning_data or record.data
    name = data.dataset
    if "".join(filter(str.isalnum, name)).lower() in {"imagenet1k", "imagenet", "ilsvrc2012", "in1k"}:
        name = paper.IMAGENET
    return name, data.classes, data.samples, record.results.eval_samples


def _how_trained(record: RunRecord, dataset: str) -> str:
    models = f", {len(record.members)} models averaged" if record.members else ""
    return f"{_how_pretrained(record, dataset)}{models}"


def _how_pretrained(record: RunRecord, dataset: str) -> str:
    epochs = record.pretrain_epochs
    inits = [tuning.init if tuning else None for tuning in record.tunings]
    if not any(inits):
        # The recipes of different methods can train different models; their runs from scratch stay apart.
        model = "" if record.method == FROM_SCRATCH else f", model of {record.method}"
        return f"no pre-training{model}, {dataset}"
    known = {init.pretrain.dataset if init and init.pretrain else None for init in inits}
    if epochs is None:
        return f"{'different or ' if record.members else ''}unknown pre-training, {dataset}"
    data = record.tuning_data or record.data
    elsewhere = " and ".join(sorted(name for name in known if name is not None and name != data.dataset))
    return f"{epochs:.4g} ep on {elsewhere}, then {dataset}" if elsewhere else f"{epochs:.4g} ep, {dataset}"


def _seeds_of_newest(runs: Sequence[Run]) -> list[Run]:
    """Return the newest run and those that differ from it in their seeds alone, one a seed, by seed."""

    def age(run: Run) -> float:
        return run[1].ended.timestamp() if run[1].ended else 0.0

    newest = max(runs, key=age)[1]
    alike = [run for run in runs if _setting(run[1]) == _setting(newest)]
    by_seed = {_replica(run[1]): run for run in sorted(alike, key=age)}
    return [by_seed[seed] for seed in sorted(by_seed)]


def _setting(record: RunRecord) -> tuple[object, ...]:
    behind = [
        (tuning.recipe_hash, tuning.init.pretrain.recipe_hash if tuning.init and tuning.init.pretrain else None)
        for tuning in record.tunings
        if tuning
    ]
    return record.recipe_hash, record.data.sha256, record.schedule, tuple(behind)


def _replica(record: RunRecord) -> tuple[object, ...]:
    """What tells repetitions apart: the seed; of ensembles the members, because the evaluation draws nothing."""
    return tuple(member.sha256 for member in record.members) or (record.seed,)


def _mean(runs: Sequence[Run]) -> Cell:
    values = [record.results.top1 for _, record in runs if record.results.top1 is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Cell(statistics.fmean(values), spread, tuple(runs))
